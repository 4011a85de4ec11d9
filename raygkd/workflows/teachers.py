"""The teacher of a run: the given one, or one that is trained and cached."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from raygkd.assembly.derived_configs import teacher_training
from raygkd.assembly.given_teacher import (
    NamedTeacher,
    given_teacher,
    named_teacher,
    untrained_teacher_file,
)
from raygkd.assembly.methods import scores_teacher
from raygkd.assembly.models import is_model_file
from raygkd.config import Config, fingerprint, to_mapping
from raygkd.data.run_images import Images
from raygkd.data.spec import ImageSpec
from raygkd.models import (
    LoadedWeights,
    ModelFile,
    load_model_file,
    read_class_names,
    save_model_file,
    short_name,
)
from raygkd.models.checkpoints import file_digest
from raygkd.models.text_classifier import read_prompts
from raygkd.rayrun import worker
from raygkd.rayrun.linear_probe import probed
from raygkd.report.console import progress
from raygkd.storage.atomic_files import Place, make_folder, place
from raygkd.storage.ownership import owned_in_turn
from raygkd.workflows.resume import MODEL
from raygkd.workflows.session import Session
from raygkd.workflows.train_one import train_one


def teacher_facts(config: Config) -> dict[str, Any]:
    """Return the fact that identifies a given teacher, even if its file is replaced."""
    facts: dict[str, Any] = {}
    if config.model.teacher_classes is not None:
        facts["teacher, class names"] = list(read_class_names(config.model.teacher_classes))
    if config.model.class_names is not None:
        facts["teacher, names in texts"] = list(read_class_names(config.model.class_names))
    if config.model.prompts is not None:
        facts["teacher, prompts"] = list(read_prompts(config.model.prompts))
    name = config.model.teacher
    if is_model_file(name):
        facts["teacher, fingerprint of the file"] = file_digest(name)[:16]
    return facts


class TeacherOfRun(NamedTuple):
    """A teacher that is ready: its model file, and where that is."""

    file: ModelFile
    path: Place


def get_teachers(
    session: Session, weights: Mapping[str, LoadedWeights | None], parent: str
) -> dict[str, TeacherOfRun]:
    """Return name -> teacher, of all that a search chooses from; see ``get_teacher``.

    Args:
        session: the open run, whose teacher is one of them.
        weights: name -> what the other teachers start from, where it is not random.
        parent: key of the search's MLflow run.
    """
    own = session.config.model.teacher
    found = {own: get_teacher(session, parent)}
    for name in weights:
        if name != own:
            other = session.with_teacher(name, weights[name])
            found[name] = get_teacher(other, parent, key=f"teacher {name}")
    return found


def get_teacher(
    session: Session, parent: str | None = None, key: str | None = None
) -> TeacherOfRun:
    """Return the teacher and its file: the given one, or one trained for these images.

    A trained teacher is cached under the hash of its configuration and images, so that later runs
    reuse it; so is one whose last layer is trained (``--teacher-mode probe``). One whose weights
    have these classes is used as it is.

    Args:
        session: the open run.
        parent: key of the parent of its MLflow run.
        key: of its MLflow run; None if the command has one teacher.
    """
    config = session.config
    spec = session.images.spec.of_teacher()
    if is_model_file(config.model.teacher):
        return _teacher_of_file(session, spec)
    named = named_teacher(config, spec)
    if named.mode in ("as-is", "probe", "features"):
        folder = given_teacher_folder(session, named)
        with _in_turn(session, folder):
            return TeacherOfRun(_given_teacher(session, named, folder), folder / MODEL)
    wanted = teacher_training(config)
    folder = teacher_folder(config, session.images, session.output)
    with _in_turn(session, folder):
        if (folder / MODEL).exists():
            session.console.print(
                f"teacher {short_name(config.model.teacher)}: reused from an earlier run"
            )
        teacher = train_one(
            session, wanted, role="teacher", folder=folder, teacher=None, parent=parent, key=key
        )
    return TeacherOfRun(teacher, folder / MODEL)


def _in_turn(session: Session, folder: Place) -> contextlib.AbstractContextManager[None]:
    """Return a context in which no other run makes the teacher of a folder.

    Once it is finished, runs read it at the same time.
    """
    if (folder / MODEL).exists():
        return contextlib.nullcontext()
    return owned_in_turn(folder, lambda line: session.console.print(line, soft_wrap=True))


def _teacher_of_file(session: Session, spec: ImageSpec) -> TeacherOfRun:
    """Return the teacher of a model file and its file, another one if classes were selected."""
    path = place(session.config.model.teacher)
    teacher = _with_scores(session, given_teacher(session.config, spec))
    if teacher.class_names == load_model_file(path).class_names:
        return TeacherOfRun(teacher, path)
    key = fingerprint([file_digest(str(path)), list(spec.class_names)])
    folder = session.output / "teachers" / f"{_folder_name(teacher.name)}-{key}"
    make_folder(folder)
    save_model_file(folder / MODEL, teacher)
    return TeacherOfRun(teacher, folder / MODEL)


def _given_teacher(session: Session, named: NamedTeacher, folder: Place) -> ModelFile:
    """Return a teacher that is used as it is or probed, and keep it in a folder."""
    config, name = session.config, short_name(session.config.model.teacher)
    spec = session.images.spec.of_teacher()
    if (folder / MODEL).exists():
        session.console.print(f"teacher {name}: reused from an earlier run")
        return load_model_file(folder / MODEL)
    teacher = untrained_teacher_file(config, spec, named)
    if named.mode == "probe":
        with progress(session.console, f"computing the features of {name}") as show:

            def advance(done: int, total: int) -> None:
                session.interrupts.raise_lost()
                show(done, total)

            teacher = probed(
                teacher,
                session.shared,
                batch_size=config.optim.batch_size,
                gpus=config.cluster.gpus_per_worker,
                progress=advance,
            )
        session.console.print(
            f"teacher {name}: validation accuracy {teacher.scores['val_score']:.4f} with a new "
            "last layer"
        )
    else:
        teacher = _with_scores(session, teacher)
    make_folder(folder)
    save_model_file(folder / MODEL, teacher)
    return teacher


def _with_scores(session: Session, teacher: ModelFile) -> ModelFile:
    """Return a given teacher with its scores on the validation images.

    It is returned as it is if its logits are not used, or there are no labels.
    """
    if not scores_teacher(session.config) or not session.images.spec.has_labels:
        return teacher
    with progress(session.console, "scoring the teacher on the validation split") as advance:
        found = worker.score_models(
            {"teacher": teacher},
            session.shared,
            "val",
            batch_size=session.config.optim.batch_size,
            gpus=session.config.cluster.gpus_per_worker,
            progress=advance,
        )["teacher"]
    scores = {f"val_{name}": value for name, value in found.items() if isinstance(value, float)}
    return dataclasses.replace(teacher, scores=scores)


def given_teacher_folder(session: Session, named: NamedTeacher) -> Place:
    """Return the folder of a teacher that is not trained as a whole, by its weights and images."""
    name, weights = session.config.model.teacher, session.weights["teacher"]
    side = session.images.spec.of_teacher().image_size[0]
    facts = [name, weights.sha256, session.images.identity, side, named.mode]
    if named.texts is not None:
        facts.append([list(named.texts.class_names), list(named.texts.prompts)])
    if named.class_names:
        facts.append([list(named.class_names), list(session.images.spec.class_names)])
    key = fingerprint(facts)
    return session.output / "teachers" / f"{_folder_name(name)}-{key}"


def _folder_name(model: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", short_name(model))


def teacher_folder(config: Config, images: Images, output: Place) -> Place:
    """Return the folder of the teacher trained for a run's images.

    Args:
        config: of the run.
        images: of the run.
        output: the output folder.
    """
    tree = to_mapping(teacher_training(config))
    started_from = [tree["model"][name] for name in ("student", "student_weights")]
    side = images.spec.of_teacher().image_size[0]
    # its settings count, not its name
    recipe = {name: value for name, value in tree["recipe"].items() if name != "recipe"}
    trained = [tree["optim"], recipe, images.augment]
    key = fingerprint([*started_from, *trained, images.identity, side])
    return output / "teachers" / f"{_folder_name(config.model.teacher)}-{key}"
