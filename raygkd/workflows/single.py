"""Training one model: ``raygkd teacher``, ``raygkd train``, and the models a search needs."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from torch import nn

from raygkd import build
from raygkd.build import ImageSpec
from raygkd.config import Config, fingerprint, to_mapping, to_yaml
from raygkd.data.plan import steps_per_epoch
from raygkd.engine import read_checkpoint
from raygkd.errors import ConfigError, UserError
from raygkd.files import Place, place
from raygkd.inputs import Images, task_of
from raygkd.models import (
    ModelFile,
    build_from_file,
    build_model,
    count_parameters,
    feature_shapes,
    load_model_file,
    save_model_file,
)
from raygkd.rayrun import trainer, worker
from raygkd.report.console import progress
from raygkd.report.tables import levels_table
from raygkd.workflows import detections
from raygkd.workflows.session import Session, open_session, run_tags, write_result

MODEL = "model.pt"
# pixels; any size will do to see whether there is a model of a name
NAME_CHECK_SIZE = (64, 64)


def teach(config: Config, *, console: Console, resume: Place | None = None) -> dict[str, Any]:
    """Train a teacher (``raygkd teacher``); return what ``--json`` prints."""
    if build.is_model_file(config.model.teacher):
        raise ConfigError(
            f"--teacher {config.model.teacher}: is a file, and 'raygkd teacher' trains a new "
            "model: give the name of one, such as resnet20"
        )
    return _train(build.teacher_alone(config), "teacher", console, resume)


def distil(config: Config, *, console: Console, resume: Place | None = None) -> dict[str, Any]:
    """Train a student (``raygkd train``); return what ``--json`` prints."""
    return _train(config, "student", console, resume)


def _train(config: Config, role: str, console: Console, resume: Place | None) -> dict[str, Any]:
    started = time.monotonic()
    check_names(config, role)
    with_teacher = build.uses_teacher(config)

    def check(images: Images) -> dict[str, Any]:
        check_student(config, images, role)
        if not with_teacher:
            return {}
        teacher = teacher_model(config, images.spec)
        show_pair(config, images.spec, teacher, console)
        return teacher_facts(config)

    with open_session(config, role, console, resume, check) as session:
        models = {"teacher": get_teacher(session)[0]} if with_teacher else {}
        teacher = models.get("teacher")
        models[role] = train_one(
            session, session.config, role=role, folder=session.folder, teacher=teacher
        )
        scores = test_scores(session, models)
        session.tracker.metrics(
            role, {"test_score": scores[role]["score"]}, step=config.optim.epochs
        )
        if session.images.spec.task == "detection":
            detections.draw(session, role, models[role], scores)
        result: dict[str, Any] = {
            "models": model_rows(models, scores),
            "val_score": models[role].scores["val_score"],
            **places(session, role, "run_id"),
        }
    result["seconds"] = round(time.monotonic() - started, 1)
    write_result(result, role)
    return result


def teacher_facts(config: Config) -> dict[str, Any]:
    """Return what tells a teacher that is given from another one in the same file."""
    name = config.model.teacher
    if not build.is_model_file(name):
        return {}
    digest = hashlib.sha256(place(name).read_bytes()).hexdigest()
    return {"teacher, fingerprint of the file": digest[:16]}


def pair_name(config: Config) -> str:
    """Return "TEACHER -> STUDENT", by which runs are called; of a teacher's file, its model."""
    teacher = config.model.teacher
    if build.is_model_file(teacher):
        teacher = load_model_file(teacher).name
    return f"{teacher} -> {config.model.student}"


def model_rows(
    models: Mapping[str, ModelFile], scores: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return role -> name, parameters and test score of each model."""
    return {
        role: {
            "model": file.name,
            "parameters": count_parameters(build_from_file(file)),
            "test_score": scores[role]["score"],
        }
        for role, file in models.items()
    }


def places(session: Session, key: str, run_name: str) -> dict[str, Any]:
    """Return where a result lies: on disk and in MLflow."""
    return {
        "mlflow": {
            "tracking_uri": session.tracker.uri,
            "experiment_id": session.tracker.experiment_id,
            run_name: session.tracker.run_id(key),
        },
        "run": str(session.folder),
        "model": str(session.folder / MODEL),
    }


def check_names(config: Config, role: str = "student") -> None:
    """Refuse what can be told to be wrong without the images, before anything starts.

    Args:
        config: what to train.
        role: "student", or "teacher" where one is trained alone.

    Raises:
        ConfigError: an unknown model, or models and settings that are not for the data set's task.
        DataError: a teacher's file or weights that are missing or damaged, or weights of another
            model.
    """
    task = task_of(config.data.dataset)
    if task is not None:
        build.check_settings(config, task)
    name = config.model.teacher
    if build.is_model_file(name):
        with _naming("--teacher"):
            file = load_model_file(name)
        if config.model.teacher_weights is not None:
            raise ConfigError(
                f"--teacher-weights: the teacher {name} is trained already: leave it out"
            )
        if task is not None:
            with _naming(f"--teacher {name}"):
                build.check_kind(file.name, task)
    elif role == "student":
        _check_model(build.teacher_alone(config), task, "teacher")
    _check_model(config, task, role)


def _check_model(config: Config, task: str | None, role: str) -> None:
    """Refuse the model that is trained, or its weights; the options are named after the role."""
    name = config.model.student
    with _naming(f"--{role}"):
        model = build_model(name, 2, NAME_CHECK_SIZE)
        if task is not None:
            build.check_kind(name, task)
    with _naming(f"--{role}-weights"):
        build.start_from_weights(config, model)


@contextlib.contextmanager
def _naming(option: str) -> Iterator[None]:
    """Put an option before what is wrong with its value."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{option}: {error}") from error


def check_student(config: Config, images: Images, role: str = "student") -> None:
    """Refuse images that the student cannot train on.

    Args:
        config: what to train.
        images: what to train on.
        role: "student", or "teacher" where one is trained alone.

    Raises:
        ConfigError: they are fewer than a batch, too small for the student, or of another task.
    """
    build.check_settings(config, images.spec.task)
    workers = config.cluster.workers.most
    steps_per_epoch(len(images.rows["train"]), workers, config.optim.batch_size // workers)
    with _naming(f"--{role}"):
        student = build.new_model(config.model.student, images.spec)
        feature_shapes(student, (), images.spec.image_size)


def teacher_model(config: Config, spec: ImageSpec) -> nn.Module:
    """Return the teacher of a run as far as it is known: the given one, or an untrained one.

    Raises:
        ConfigError: it tells other classes apart, the images are too small for it, or it cannot be
            trained with these settings.
        DataError: its weights are not those of the model it names.
    """
    name = config.model.teacher
    if not build.is_model_file(name):
        wanted = build.teacher_training(config)
        with _naming("--teacher"):
            teacher = build.new_model(wanted.model.student, spec)
    else:
        file = load_model_file(name)
        with _naming(f"--teacher {name}"):
            build.check_teacher(file, spec)
            teacher = build_from_file(file)
    with _naming("--teacher"):
        feature_shapes(teacher, (), spec.image_size)
    return teacher


def show_pair(config: Config, spec: ImageSpec, teacher: nn.Module, console: Console) -> None:
    """Print what the student starts with of the teacher, and the levels that are matched.

    Raises:
        ConfigError: unknown levels, a spectral dimension too large for one, or nothing to inherit.
    """
    student = build.new_model(config.model.student, spec)
    with _naming("--inherit"):
        copied = build.start_from_teacher(config, student, teacher)
    graph = None
    method = config.method.method
    if "graph" in method:
        with _naming("--levels"):
            build.chosen_levels(config, teacher, student)
        with _naming("--dim"):
            graph = build.build_graph_loss(config, teacher, student, spec.image_size)
    elif build.distils(config):
        with _naming(f"--method {method}"):
            objective = build.build_objective(config, spec, teacher)
        if objective.levels:
            levels = ", ".join(map(str, objective.levels))
            console.print(f"{method} compares the maps of level {levels}")
    if copied:
        parameters = sum(count_parameters(student.get_submodule(path)) for path in copied)
        console.print(
            f"the student starts from the teacher's neck and heads: {parameters:,} of its "
            f"{count_parameters(student):,} parameters"
        )
    if graph is not None:
        console.print(levels_table(graph.describe()))


def train_one(
    session: Session,
    config: Config,
    *,
    role: str,
    folder: Place,
    teacher: ModelFile | None,
    parent: str | None = None,
) -> ModelFile:
    """Train one model over the cluster, record it, and write it for use.

    A folder that holds a finished model gives that; one that was broken off goes on.

    Args:
        session: the open run.
        config: what to train.
        role: "teacher", "student-alone" or "student": its MLflow run's name and tag.
        folder: gets checkpoints, the metrics' journal and the model file.
        teacher: where the method needs one.
        parent: key of the MLflow parent run.
    """
    if (folder / MODEL).exists():
        return load_model_file(folder / MODEL)
    job = session.job(config, teacher, folder)
    session.tracker.start(
        role,
        f"{role} {config.model.student}",
        parent=parent,
        params={"student": config.model.student, "method": config.method.method},
        tags=run_tags(session, role),
        texts={"config.yaml": to_yaml(config)},
    )
    with progress(session.console, f"training {role} {config.model.student}") as advance:

        def on_epoch(metrics: dict[str, float]) -> None:
            epoch = int(metrics["epoch"])
            session.tracker.metrics(role, metrics, step=epoch)
            advance(epoch, config.optim.epochs, f"val {metrics['val_score']:.4f}")

        advance(0, config.optim.epochs)
        with session.interrupts.waiting_for(lambda: [folder.name]):
            checkpoint = trainer.train(job, config.cluster, cpus=session.cpus(), on_epoch=on_epoch)
    last = trainer.last_metrics(folder)
    scores = {name: value for name, value in last.items() if name.startswith("val_")}
    model_file = build.student_file(
        config, session.images.spec, read_checkpoint(checkpoint)["student"], scores
    )
    save_model_file(folder / MODEL, model_file)
    session.tracker.end(role)
    return model_file


def get_teacher(session: Session, parent: str | None = None) -> tuple[ModelFile, Place]:
    """Return the teacher and its file: the one that is given, or one trained for these images.

    A trained teacher is kept by the hash of its configuration and images, so that the next run
    that asks for the same one has it.
    """
    config = session.config
    if build.is_model_file(config.model.teacher):
        path = place(config.model.teacher)
        return load_model_file(path), path
    wanted = build.teacher_training(config)
    folder = teacher_folder(config, session.images, session.output)
    if (folder / MODEL).exists():
        session.console.print(f"teacher {config.model.teacher}: kept from an earlier run")
    teacher = train_one(session, wanted, role="teacher", folder=folder, teacher=None, parent=parent)
    return teacher, folder / MODEL


def teacher_folder(config: Config, images: Images, output: Place) -> Place:
    """Return the folder of the teacher that is trained for a run's images.

    Args:
        config: of the run.
        images: of the run.
        output: the output folder.
    """
    tree = to_mapping(build.teacher_training(config))
    started_from = [tree["model"][name] for name in ("student", "student_weights")]
    key = fingerprint([*started_from, tree["optim"], images.augment, images.identity])
    return output / "teachers" / f"{config.model.teacher.replace(':', '-')}-{key}"


def test_scores(session: Session, models: Mapping[str, ModelFile]) -> dict[str, dict[str, Any]]:
    """Return each model's scores on the test split."""
    with progress(session.console, "scoring models on the test split") as advance:
        return worker.score_models(
            models,
            session.shared,
            "test",
            batch_size=session.config.optim.batch_size,
            gpus=min(1.0, session.config.cluster.gpus_per_worker),
            progress=advance,
        )
