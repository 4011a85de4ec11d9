"""What the commands do, from configuration to result: ``teach``, ``distil`` and ``search``."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import secrets
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from raygkd import __version__, build, tracking
from raygkd.config import Config, fingerprint, to_mapping, to_yaml, with_settings
from raygkd.data.windows import load_window
from raygkd.engine import read_checkpoint
from raygkd.errors import DataError, ResourceError
from raygkd.inputs import Images, open_images
from raygkd.models import (
    ModelFile,
    build_classifier,
    build_from_file,
    count_parameters,
    load_model_file,
    save_model_file,
)
from raygkd.rayrun import cluster, ingest, trainer, worker
from raygkd.rayrun import search as searching
from raygkd.report.console import progress
from raygkd.report.tables import levels_table
from raygkd.space import Dimension, check_space, default_space, read_space

MODEL = "model.pt"
REGISTERED = "raygkd-{dataset}-{student}"


@dataclass(kw_only=True)
class Session:
    """A run with everything it needs open.

    Attributes:
        config: the settings.
        folder: of this run, absolute.
        output: the output folder, absolute.
        nodes: what the nodes of the cluster have.
        images: the images; ``shared`` are they in the object store.
        tracker: MLflow.
        console: for progress.
    """

    config: Config
    folder: Path
    output: Path
    nodes: list[cluster.Resources]
    images: Images
    shared: ingest.SharedImages
    tracker: tracking.Tracker
    console: Console

    @property
    def data_cpus(self) -> float:
        """CPUs that the data stream needs besides the training."""
        return ingest.DATA_CPUS if self.shared.decoded is None else 0.0

    def cpus(self) -> float:
        """Return the CPUs of each worker of a run that has the cluster for itself."""
        return cluster.worker_cpus(self.config.cluster, self.nodes, data_cpus=self.data_cpus)


def output_folder(output: str) -> Path:
    """Return the absolute output folder, made if it is not there.

    Raises:
        ResourceError: it cannot be written.
    """
    folder = Path(output).expanduser().resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{secrets.token_hex(4)}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ResourceError(
            f"--output {output}: cannot be written ({error.strerror}); give another folder"
        ) from error
    return folder


def new_run_folder(output: Path, kind: str) -> Path:
    """Return a name for a run's folder that no other has; it is not made yet."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return output / "runs" / f"{kind}-{stamp}-{secrets.token_hex(2)}"


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


@contextlib.contextmanager
def open_session(
    config: Config, kind: str, console: Console, resume: Path | None
) -> Iterator[Session]:
    """Open tracking, cluster and images, cheapest check first; close them whatever happens.

    Runs that are open in MLflow when an error comes through end as FAILED, or KILLED on Ctrl-C.
    """
    started = time.monotonic()
    output = output_folder(config.output.output)
    nodes = cluster.known_nodes(config.cluster.address)
    if nodes is not None:
        _require_room(config, nodes, 0.0)
    uri = config.output.tracking_uri or tracking.default_uri(output)
    experiment = tracking.connect(uri, config.output.experiment, output)
    folder = resume or new_run_folder(output, kind)
    with progress(console, "preparing images") as advance:
        images = open_images(config.data, seed=config.optim.seed, output=output, progress=advance)
    streamed = not ingest.fits_in_memory(images, config.data.cache_mb)
    data_cpus = ingest.DATA_CPUS if streamed else 0.0
    if nodes is not None:
        _require_room(config, nodes, data_cpus)
    with cluster.cluster(config.cluster.address) as nodes:
        _require_room(config, nodes, data_cpus)
        write_text(folder / "config.yaml", to_yaml(config))
        tracker = tracking.Tracker(uri, experiment, folder / "tracking.jsonl")
        status = "FAILED"
        try:
            with progress(console, "decoding images") as advance:
                shared = ingest.share(images, config.data.cache_mb, advance)
            yield Session(
                config=config,
                folder=folder,
                output=output,
                nodes=nodes,
                images=images,
                shared=shared,
                tracker=tracker,
                console=console,
            )
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            command = {"student": "train"}.get(kind, kind)
            console.print(f"stopped; go on with: raygkd {command} --resume {folder}", soft_wrap=True)
            raise
        finally:
            tracker.close(status)
    console.print(f"took {time.monotonic() - started:.0f} s")


def _require_room(config: Config, nodes: Sequence[cluster.Resources], data_cpus: float) -> int:
    cpus = config.cluster.cpus_per_worker or 1.0
    bundles = cluster.run_bundles(config.cluster, cpus)
    return cluster.require_room(nodes, bundles, data_cpus=data_cpus)


def run_tags(session: Session, role: str) -> dict[str, str]:
    """Return the facts that every MLflow run carries."""
    rows = session.images.rows
    tags = {
        "raygkd.role": role,
        "raygkd.dataset": session.config.data.dataset,
        "raygkd.images": session.images.identity,
        "raygkd.split": ", ".join(f"{name} {len(rows[name])}" for name in ("train", "val", "test")),
        "raygkd.folder": str(session.folder),
        "python": platform.python_version(),
    }
    tags["version.raygkd"] = __version__
    for package in ("torch", "torchvision", "ray", "mlflow"):
        tags[f"version.{package}"] = version(package)
    commit = _git_commit()
    return tags | ({"mlflow.source.git.commit": commit} if commit else {})


def _git_commit() -> str | None:
    """Return the commit of the folder that raygkd runs in, if it is one."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, timeout=10
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def train_one(
    session: Session,
    config: Config,
    *,
    role: str,
    folder: Path,
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
    job = worker.make_job(config, session.shared, teacher)
    session.tracker.start(
        role,
        f"{role} {config.model.student}",
        parent=parent,
        params={"student": config.model.student, "method": config.method.method},
        tags=run_tags(session, role),
        texts={"config.yaml": to_yaml(config)},
    )
    last: dict[str, float] = {}
    with progress(session.console, f"training {role} {config.model.student}") as advance:

        def on_epoch(metrics: dict[str, float]) -> None:
            last.update(metrics)
            epoch = int(metrics["epoch"])
            session.tracker.metrics(role, metrics, step=epoch)
            advance(epoch, config.optim.epochs, f"val {metrics['val_score']:.4f}")  # type: ignore[call-arg]

        advance(0, config.optim.epochs)
        checkpoint = trainer.train(
            job, config.cluster, cpus=session.cpus(), folder=folder, on_epoch=on_epoch
        )
    scores = {name: value for name, value in last.items() if name.startswith("val_")}
    model_file = build.student_file(
        config, session.images.spec, read_checkpoint(checkpoint)["student"], scores
    )
    save_model_file(folder / MODEL, model_file)
    session.tracker.end(role)
    return model_file


def get_teacher(session: Session, parent: str | None = None) -> tuple[ModelFile, Path]:
    """Return the teacher and its file: the one that is given, or one trained for these images.

    A trained teacher is kept by the hash of its configuration and images, so that the next run
    that asks for the same one has it.
    """
    config = session.config
    if build.is_model_file(config.model.teacher):
        path = Path(config.model.teacher)
        teacher = load_model_file(path)
        build.check_teacher(teacher, session.images.spec, config.model.teacher)
        return teacher, path
    wanted = build.teacher_training(config)
    tree = to_mapping(wanted)
    key = fingerprint(
        [tree["model"]["student"], tree["optim"], session.images.augment, session.images.identity]
    )
    folder = session.output / "teachers" / f"{config.model.teacher.replace(':', '-')}-{key}"
    if (folder / MODEL).exists():
        session.console.print(f"teacher {config.model.teacher}: kept from an earlier run")
    teacher = train_one(session, wanted, role="teacher", folder=folder, teacher=None, parent=parent)
    return teacher, folder / MODEL


def show_levels(session: Session, config: Config, teacher: ModelFile) -> dict[int, int]:
    """Print the levels a configuration matches; return level -> the teacher's channels.

    Raises:
        ConfigError: unknown levels, or a spectral dimension too large for one.
    """
    spec = session.images.spec
    student = build_classifier(config.model.student, len(spec.class_names))
    graph = build.build_graph_loss(config, build_from_file(teacher), student, spec.image_size)
    session.console.print(levels_table(graph.describe()))
    return {level: shape[0] for level, shape in graph.teacher_shapes.items()}


def test_scores(session: Session, models: Mapping[str, ModelFile]) -> dict[str, dict[str, float]]:
    """Return each model's scores on the test split."""
    return worker.score_models(
        models,
        session.shared,
        "test",
        batch_size=session.config.optim.batch_size,
        gpus=min(1.0, session.config.cluster.gpus_per_worker),
    )


def example_images(images: Images) -> np.ndarray:
    """Return two validation images as float32 (2, 3, S, S) in 0..1."""
    window = load_window(
        images.table,
        images.rows["val"][:2],
        images.transform("val"),
        seed=0,
        epoch=0,
        skip_bad=True,
        exact=False,
    )
    return window.arrays["image"].astype(np.float32) / 255.0


def teach(config: Config, *, console: Console, resume: Path | None = None) -> dict[str, Any]:
    """Train a teacher (``raygkd teacher``); return what ``--json`` prints."""
    return _single(config, "teacher", console, resume)


def distil(config: Config, *, console: Console, resume: Path | None = None) -> dict[str, Any]:
    """Train a student (``raygkd train``); return what ``--json`` prints."""
    return _single(config, "student", console, resume)


def _single(config: Config, role: str, console: Console, resume: Path | None) -> dict[str, Any]:
    started = time.monotonic()
    check_names(config)
    with open_session(config, role, console, resume) as session:
        teacher, models = None, {}
        if role == "student" and build.uses_teacher(config):
            teacher, _ = get_teacher(session)
            models["teacher"] = teacher
            if "graph" in config.method.method:
                show_levels(session, config, teacher)
        wanted = config
        if role == "teacher":
            wanted = with_settings(
                config, {"student": config.model.teacher, "method": "none", "levels": None}
            )
        model = train_one(session, wanted, role=role, folder=session.folder, teacher=teacher)
        scores = test_scores(session, {role: model, **models})
        result: dict[str, Any] = {
            "run": str(session.folder),
            "model": str(session.folder / MODEL),
            "models": {
                name: {
                    "model": file.name,
                    "parameters": count_parameters(build_from_file(file)),
                    "test_score": scores[name]["score"],
                }
                for name, file in {**models, role: model}.items()
            },
            "val_score": model.scores["val_score"],
            "mlflow": _mlflow(session, role, "run_id"),
        }
        session.tracker.metrics(
            role, {"test_score": scores[role]["score"]}, step=config.optim.epochs
        )
    result["seconds"] = round(time.monotonic() - started, 1)
    write_text(Path(result["run"]) / "result.json", json.dumps(result, indent=2))
    return result


def _mlflow(session: Session, key: str, name: str) -> dict[str, Any]:
    return {
        "tracking_uri": session.tracker.uri,
        "experiment_id": session.tracker.experiment_id,
        name: session.tracker.run_id(key),
    }


def check_names(config: Config) -> None:
    """Refuse unknown models before anything starts.

    Raises:
        ConfigError: an unknown model name, or a teacher file that is not there.
    """
    build_classifier(config.model.student, 2)
    if build.is_model_file(config.model.teacher):
        load_model_file(config.model.teacher)
    else:
        build_classifier(config.model.teacher, 2)


class SearchProgress(searching.SearchObserver):
    """Records a search in MLflow and shows how far it is."""

    def __init__(self, session: Session, advance: Any):
        self._session = session
        self._advance = advance
        self._trials = session.config.search.trials
        self._epochs: dict[str, int] = {}
        self._ended: set[str] = set()
        self._best = 0.0

    def started(self, trial_id: str, params: Mapping[str, Any]) -> None:
        """Open the trial's MLflow run."""
        self._session.tracker.start(
            trial_id,
            f"trial {trial_id.rpartition('_')[2]}",
            parent="search",
            params=params,
            tags=run_tags(self._session, "trial"),
            texts={"config.yaml": to_yaml(with_settings(self._session.config, params))},
        )
        self._show()

    def reported(self, trial_id: str, metrics: Mapping[str, float]) -> None:
        """Log an epoch."""
        self._epochs[trial_id] = int(metrics["epoch"])
        self._best = max(self._best, metrics[searching.METRIC])
        self._session.tracker.metrics(trial_id, metrics, step=self._epochs[trial_id])
        self._show()

    def ended(self, trial_id: str, failed: bool) -> None:
        """Close the trial's MLflow run."""
        self._ended.add(trial_id)
        self._session.tracker.end(trial_id, "FAILED" if failed else "FINISHED")
        self._show()

    def _show(self) -> None:
        running = len(self._epochs.keys() - self._ended)
        epochs = sum(self._epochs.values())
        note = f"{running} running, {epochs} epochs, best val {self._best:.4f}"
        self._advance(len(self._ended), self._trials, note)


def tune(config: Config, *, console: Console, resume: Path | None = None) -> dict[str, Any]:
    """Search the method's settings (``raygkd tune``); return what ``--json`` prints.

    The teacher is trained first where none is given, then the student alone as the control, then
    the trials. Validation chooses; the test split is scored once, for the three models at the end.
    """
    started = time.monotonic()
    check_names(config)
    space = read_space(config.search.space) if config.search.space else None
    with open_session(config, "tune", console, resume) as session:
        session.tracker.start(
            "search",
            f"search {config.model.teacher} -> {config.model.student}",
            tags=run_tags(session, "search"),
            texts={"config.yaml": to_yaml(config)},
        )
        teacher, teacher_path = get_teacher(session, "search")
        space = _checked_space(session, teacher, space)
        alone = train_one(
            session,
            build.student_alone(config),
            role="student-alone",
            folder=session.folder / "student-alone",
            teacher=None,
            parent="search",
        )
        trials = _search(session, teacher, space, resume=resume is not None)
        result = _conclude(session, trials, {"teacher": teacher, "student_alone": alone})
    result["teacher"]["path"] = str(teacher_path)
    result["seconds"] = round(time.monotonic() - started, 1)
    write_text(Path(result["run"]) / "result.json", json.dumps(result, indent=2))
    return result


def _checked_space(
    session: Session, teacher: ModelFile, space: tuple[Dimension, ...] | None
) -> tuple[Dimension, ...]:
    config = session.config
    channels: dict[int, int] = {}
    if "graph" in config.method.method:
        # all levels with as many pairs as there can be; a trial takes some of both
        shapes = build.level_shapes(config, teacher, session.images.spec)
        most = min(shape[0] for shape in shapes.values()) - 1
        whole = with_settings(config, {"levels": None, "dim": most})
        channels = show_levels(session, whole, teacher)
    space = space or default_space(config.method.method, channels)
    check_space(space, config, channels)
    return space


def _search(
    session: Session, teacher: ModelFile, space: tuple[Dimension, ...], *, resume: bool
) -> list[searching.TrialResult]:
    config = session.config
    cpus = config.cluster.cpus_per_worker or 1.0
    fitting = _require_room(config, session.nodes, session.data_cpus)
    concurrent = min(fitting, config.search.trials, config.search.max_concurrent or fitting)
    with progress(session.console, f"trials ({concurrent} at a time)") as advance:
        advance(0, config.search.trials)
        return searching.run_search(
            worker.make_job(config, session.shared, teacher),
            config,
            space,
            cpus=cpus,
            concurrent=concurrent,
            folder=session.folder,
            observer=SearchProgress(session, advance),
            resume=resume,
        )


def _conclude(
    session: Session,
    trials: Sequence[searching.TrialResult],
    others: dict[str, ModelFile],
) -> dict[str, Any]:
    """Score the winner beside teacher and student alone, record it, and return the result."""
    winner = next((trial for trial in trials if trial.checkpoint is not None), None)
    if winner is None or winner.val_score is None:
        errors = "; ".join(sorted({trial.error or trial.status for trial in trials}))
        raise DataError(f"no trial came to its end: {errors}")
    config = with_settings(session.config, winner.params)
    assert winner.checkpoint is not None
    state = read_checkpoint(winner.checkpoint)["student"]
    best = build.student_file(config, session.images.spec, state, {"val_score": winner.val_score})
    models = {**others, "best": best}
    scores = test_scores(session, models)
    save_model_file(session.folder / MODEL, best)
    tracker, parameters = session.tracker, {}
    for name, file in models.items():
        parameters[name] = count_parameters(build_from_file(file))
        tracker.metrics(
            "search",
            {f"{name}_test_score": scores[name]["score"], f"{name}_parameters": parameters[name]},
            step=0,
        )
    tracker.metrics("search", {searching.METRIC: winner.val_score}, step=0)
    tracker.tags("search", {f"best.{name}": str(value) for name, value in winner.params.items()})
    logged = tracker.model(
        "search",
        build.DeployedClassifier(best),
        example_images(session.images),
        register_as=REGISTERED.format(
            dataset=session.config.data.dataset, student=best.name.replace(":", "-")
        ),
    )
    return {
        "best": {
            "params": winner.params,
            "val_score": winner.val_score,
            "test_score": scores["best"]["score"],
            "epochs": winner.epochs,
            "model_uri": logged.uri if logged else None,
            "model": best.name,
            "parameters": parameters["best"],
            "registered": asdict(logged) if logged else None,
        },
        **{
            name: {
                "model": file.name,
                "test_score": scores[name]["score"],
                "parameters": parameters[name],
            }
            for name, file in others.items()
        },
        "trials": [
            {
                "params": trial.params,
                "epochs": trial.epochs,
                "val_score": trial.val_score,
                "status": trial.status,
                "run_id": tracker.run_id(trial.trial_id),
                "error": trial.error,
            }
            for trial in trials
        ],
        "mlflow": _mlflow(session, "search", "parent_run_id"),
        "run": str(session.folder),
    }
