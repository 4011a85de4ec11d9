"""An open run: its folder, images, cluster and MLflow, closed whatever happens."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from raygkd import __version__, tracking
from raygkd.build import is_model_file
from raygkd.config import Config, to_yaml, with_settings
from raygkd.errors import ResourceError, StorageError, UserError
from raygkd.files import write_text
from raygkd.inputs import Images, open_images
from raygkd.models import TORCHVISION_WEIGHTS, ModelFile
from raygkd.rayrun import cluster, ingest, trainer, worker
from raygkd.rayrun.stopping import StopFolder
from raygkd.report.console import progress
from raygkd.resuming import CONFIG, RESULT, check_facts, note_facts
from raygkd.workflows.interrupts import Interrupts

# what MLflow has to take what is left
CLOSE_SECONDS = 4.0
# role of a run -> the command that makes it
COMMANDS = {"teacher": "teacher", "student": "train", "search": "tune"}


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
        interrupts: Ctrl-C.
        console: for progress.
    """

    config: Config
    folder: Path
    output: Path
    nodes: list[cluster.Resources]
    images: Images
    shared: ingest.SharedImages
    tracker: tracking.Tracker
    interrupts: Interrupts
    console: Console

    @property
    def data_cpus(self) -> float:
        """CPUs that the data stream needs besides the training."""
        return _data_cpus(self.shared.decoded is None)

    def job(self, config: Config, teacher: ModelFile | None, folder: Path) -> worker.Job:
        """Return what training processes are sent to train in a folder, on this run's images."""
        return worker.make_job(
            config, self.shared, teacher, folder=folder, stop=self.interrupts.folder
        )

    def cpus(self) -> float:
        """Return the CPUs of each worker of a run that has the cluster for itself."""
        return cluster.worker_cpus(self.config.cluster, self.nodes, data_cpus=self.data_cpus)


def _data_cpus(streamed: bool) -> float:
    return ingest.DATA_CPUS if streamed else 0.0


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


def with_absolute_paths(config: Config) -> Config:
    """Return the configuration as it can be given back from another folder."""
    paths = {
        "data_dir": config.data.data_dir,
        "output": config.output.output,
        "space": config.search.space,
        "teacher": config.model.teacher if is_model_file(config.model.teacher) else None,
    }
    for name in ("teacher_weights", "student_weights"):
        weights = getattr(config.model, name)
        paths[name] = None if weights in TORCHVISION_WEIGHTS else weights
    local = {name: path for name, path in paths.items() if path and "://" not in path}
    return with_settings(
        config, {name: os.path.abspath(os.path.expanduser(path)) for name, path in local.items()}
    )


def new_run_folder(output: Path, kind: str) -> Path:
    """Return a name for a run's folder that no other has; it is not made yet."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return output / "runs" / f"{kind}-{stamp}-{secrets.token_hex(2)}"


@contextlib.contextmanager
def open_session(
    config: Config,
    role: str,
    console: Console,
    resume: Path | None,
    check: Callable[[Images], Mapping[str, Any]],
) -> Iterator[Session]:
    """Open tracking, images and cluster, the cheapest check first; close them whatever happens.

    Runs that are open in MLflow when an error comes through end as FAILED, or KILLED on Ctrl-C.

    Args:
        config: the settings.
        role: "teacher", "student" or "search".
        console: for progress.
        resume: folder of the run to go on with.
        check: refuses images that do not go with the models, before anything is started; returns
            what a run must rest on when it is resumed, besides the images.

    Raises:
        UserError: whatever cannot be had, before anything is started.
    """
    started = time.monotonic()
    output = output_folder(config.output.output)
    known = cluster.known_nodes(config.cluster.address)
    if known is not None:
        require_room(config, known, 0.0)
    uri = config.output.tracking_uri or tracking.default_uri(output)
    experiment = tracking.connect(uri, config.output.experiment, output)
    with progress(console, "preparing images") as advance:
        images = open_images(config.data, seed=config.optim.seed, output=output, progress=advance)
    facts = {**_image_facts(images), **check(images)}
    folder = resume or new_run_folder(output, COMMANDS[role])
    if resume is not None:
        check_facts(folder, facts)
    data_cpus = _data_cpus(not ingest.fits_in_memory(images, config.data.cache_mb))
    if known is not None:
        require_room(config, known, data_cpus)
    config = with_absolute_paths(config)
    interrupts = Interrupts(StopFolder(folder / "stop"), lambda line: console.print(line))
    with (
        interrupts.handled(),
        cluster.cluster(config.cluster.address) as nodes,
        _mistakes_themselves(),
    ):
        require_room(config, nodes, data_cpus)
        with progress(console, "decoding images") as advance:
            shared = ingest.share(images, config.data.cache_mb, advance)
        write_text(folder / CONFIG, to_yaml(config))
        # the last of what a run is resumed by
        if resume is None:
            note_facts(folder, facts)
        session = Session(
            config=config,
            folder=folder,
            output=output,
            nodes=nodes,
            images=images,
            shared=shared,
            tracker=tracking.Tracker(uri, experiment, folder / "tracking.jsonl"),
            interrupts=interrupts,
            console=console,
        )
        with _closing(session, role):
            yield session
    console.print(f"took {time.monotonic() - started:.0f} s")


@contextlib.contextmanager
def _mistakes_themselves() -> Iterator[None]:
    """Raise a user's mistake that shows in a Ray task as itself, without Ray's traceback."""
    try:
        yield
    except UserError as error:
        trainer.raise_cause(error)


def _image_facts(images: Images) -> dict[str, Any]:
    """Return what tells a data set from another one, or from itself when it has changed."""
    counts = {f"data set, {split} images": len(rows) for split, rows in images.rows.items()}
    return {
        **counts,
        "data set, classes": list(images.spec.class_names),
        "data set, side of the model input": images.spec.image_size[0],
        "data set, fingerprint of images and splits": images.identity,
    }


@contextlib.contextmanager
def _closing(session: Session, role: str) -> Iterator[None]:
    status = "FAILED"
    try:
        with _telling_the_way_on(session.folder, role):
            yield
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        command = _way_on(session.folder, role)
        session.console.print(f"stopped; go on with: {command}", soft_wrap=True)
        raise
    finally:
        session.tracker.close(status, timeout=CLOSE_SECONDS)


def _way_on(folder: Path, role: str) -> str:
    return f"raygkd {COMMANDS[role]} --resume {folder}"


@contextlib.contextmanager
def _telling_the_way_on(folder: Path, role: str) -> Iterator[None]:
    """Add to what cannot be written how a run goes on when it can."""
    try:
        yield
    except StorageError as error:
        command = _way_on(folder, role)
        remedy = f"when it can be written again, go on with: {command}"
        raise StorageError(f"{error}: {remedy}") from error


def write_result(result: Mapping[str, Any], role: str) -> None:
    """Write what ``--json`` prints of a run to its folder: the run is over.

    Raises:
        StorageError: it cannot be written.
    """
    folder = Path(result["run"])
    with _telling_the_way_on(folder, role):
        write_text(folder / RESULT, json.dumps(result, indent=2))


def require_room(config: Config, nodes: Sequence[cluster.Resources], data_cpus: float) -> int:
    """Return how many runs fit at once.

    Raises:
        ResourceError: none does.
    """
    bundles = cluster.run_bundles(config.cluster, config.cluster.cpus_per_worker or 1.0)
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
