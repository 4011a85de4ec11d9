"""An open run: its folder, images, cluster and MLflow, closed whatever happens."""

from __future__ import annotations

import contextlib
import json
import platform
import secrets
import shutil
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
from raygkd.errors import ConfigError, ResourceError, StorageError, TrackingError, UserError
from raygkd.files import Place, is_remote, make_folder, place, whole_file, write_text
from raygkd.inputs import Images, open_images
from raygkd.models import TORCHVISION_WEIGHTS, ModelFile
from raygkd.rayrun import cluster, ingest, trainer, worker
from raygkd.rayrun.nodes import NodeWatch, require_shared
from raygkd.rayrun.stopping import StopFolder
from raygkd.report.console import progress
from raygkd.resuming import (
    CONFIG,
    INPUTS,
    RESULT,
    TRACKING,
    check_facts,
    lasting_path,
    new_run_folder,
    note_facts,
)
from raygkd.workflows.interrupts import Interrupts

# what MLflow has to take what is left
CLOSE_SECONDS = 4.0
# role of a run -> the command that makes it
COMMANDS = {"teacher": "teacher", "student": "train", "search": "tune", "comparison": "compare"}


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
    folder: Place
    output: Place
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

    def job(self, config: Config, teacher: ModelFile | None, folder: Place) -> worker.Job:
        """Return what training processes are sent to train in a folder, on this run's images."""
        return worker.make_job(
            config, self.shared, teacher, folder=folder, stop=self.interrupts.folder
        )

    def cpus(self) -> float:
        """Return the CPUs of each worker of a run that has the cluster for itself."""
        return cluster.worker_cpus(self.config.cluster, self.nodes, data_cpus=self.data_cpus)


def _data_cpus(streamed: bool) -> float:
    return ingest.DATA_CPUS if streamed else 0.0


def output_folder(given: str) -> Place:
    """Return the absolute output folder, made if it is not there.

    Raises:
        ConfigError: a URL that cannot be used.
        ResourceError: it cannot be written.
    """
    try:
        folder = place(given)
    except ConfigError as error:
        raise ConfigError(f"--output {error}") from error
    probe = folder / f".writable-{secrets.token_hex(4)}"
    try:
        write_text(probe, "")
        probe.unlink()
    except (OSError, StorageError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ResourceError(
            f"--output {given}: cannot be written ({reason}); give another folder"
        ) from error
    return folder


def with_lasting_paths(config: Config, output: Place) -> Config:
    """Return the configuration as it can be given back from another folder, or another job."""
    paths = {
        "data_dir": config.data.data_dir,
        "output": config.output.output,
        "space": config.search.space,
        "teacher": config.model.teacher if is_model_file(config.model.teacher) else None,
    }
    for name in ("teacher_weights", "student_weights"):
        weights = getattr(config.model, name)
        paths[name] = None if weights in TORCHVISION_WEIGHTS else weights
    lasting = {}
    for name, path in paths.items():
        if path is not None:
            lasting[name] = lasting_path(path, output)
            copy = place(lasting[name])
            if copy.parent == output / INPUTS and not copy.exists():
                make_folder(copy.parent)
                with whole_file(copy) as temporary:
                    shutil.copy(path, temporary)
    return with_settings(config, lasting)


@contextlib.contextmanager
def open_session(
    config: Config,
    role: str,
    console: Console,
    resume: Place | None,
    check: Callable[[Images], Mapping[str, Any]],
) -> Iterator[Session]:
    """Open tracking, images and cluster, the cheapest check first; close them whatever happens.

    Runs that are open in MLflow when an error comes through end as FAILED, or KILLED on Ctrl-C.

    Args:
        config: the settings.
        role: "teacher", "student", "search" or "comparison".
        console: for progress.
        resume: folder of the run to go on with.
        check: refuses images that do not go with the models, before anything is started; returns
            what a run must rest on when it is resumed, besides the images.

    Raises:
        UserError: whatever cannot be had, before anything is started.
    """
    started = time.monotonic()
    uri = tracking.chosen_uri(config.output.tracking_uri, config.output.output)
    output = output_folder(config.output.output)
    with contextlib.ExitStack() as stack:
        # to join a cluster takes less than to prepare images, and to start one more than to look
        nodes = stack.enter_context(_joined(config, output, uri, console)) or [cluster.local_node()]
        require_room(config, nodes, 0.0)
        experiment = tracking.connect(uri, config.output.experiment, output)
        with progress(console, "preparing images") as advance:
            images = open_images(
                config.data, seed=config.optim.seed, output=output, progress=advance
            )
        folder = resume or new_run_folder(output, COMMANDS[role], config.output.name)
        facts = {"MLflow store": tracking.shown(uri), **_image_facts(images), **check(images)}
        if resume is not None:
            check_facts(folder, facts)
        data_cpus = _data_cpus(not ingest.fits_in_memory(images, config.data.cache_mb))
        require_room(config, nodes, data_cpus)
        config = with_lasting_paths(config, output)
        interrupts = Interrupts(StopFolder(folder / "stop"), lambda line: console.print(line))
        stack.enter_context(interrupts.handled())
        if not cluster.is_joined(config.cluster.address):
            nodes = stack.enter_context(cluster.cluster(None))
        stack.enter_context(_mistakes_themselves())
        if data_cpus and not is_remote(images.table.path):
            require_shared("--data-dir", Path(images.table.path), Path(images.table.files[0]))
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
            tracker=tracking.Tracker(uri, experiment, folder / TRACKING),
            interrupts=interrupts,
            console=console,
        )
        with _closing(session, role), _watched_nodes(session, role):
            yield session
    console.print(f"took {time.monotonic() - started:.0f} s")


@contextlib.contextmanager
def _joined(
    config: Config, output: Place, uri: str, console: Console
) -> Iterator[list[cluster.Resources] | None]:
    """Join the running cluster that is meant; yield its nodes, None where one is to be started.

    Raises:
        UserError: nobody answers there, or its nodes cannot share what the run writes.
    """
    if not cluster.is_joined(config.cluster.address):
        yield None
        return
    with cluster.cluster(config.cluster.address):
        nodes = cluster.wait_for_room(
            _bundles(config, fewest=True),
            minutes=config.cluster.wait_minutes,
            tell=lambda line: console.print(line, soft_wrap=True),
        )
        if len(nodes) > 1 or config.cluster.wait_minutes:
            _require_one_truth(output, uri)
        yield nodes


def _require_one_truth(output: Place, uri: str) -> None:
    """Refuse results in places that only one of several nodes has.

    Raises:
        ResourceError: an output folder that one of them does not see.
        TrackingError: an MLflow store that is a file.
    """
    if uri.startswith("sqlite"):
        raise TrackingError(
            f"--tracking-uri {uri}: the cluster has several nodes or will have, and a file is no "
            "store for them: give the URL of an MLflow server ('raygkd ui --host' starts one)"
        )
    if isinstance(output, Path):
        witness = output / f".seen-{secrets.token_hex(4)}"
        witness.touch()
        try:
            require_shared("--output", output, witness)
        finally:
            witness.unlink()


def _watched_nodes(session: Session, role: str) -> NodeWatch:
    """Return what records the load of every node in the command's MLflow run."""

    def record(load: dict[str, float], seconds: int) -> None:
        if session.tracker.is_open(role):
            session.tracker.metrics(role, load, step=seconds)

    return NodeWatch(record, lambda line: session.console.print(line, soft_wrap=True))


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


def _way_on(folder: Place, role: str) -> str:
    return f"raygkd {COMMANDS[role]} --resume {folder}"


@contextlib.contextmanager
def _telling_the_way_on(folder: Place, role: str) -> Iterator[None]:
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
    folder = place(result["run"])
    with _telling_the_way_on(folder, role):
        write_text(folder / RESULT, json.dumps(result, indent=2))


def require_room(config: Config, nodes: Sequence[cluster.Resources], data_cpus: float) -> int:
    """Return how many runs fit at once, each with as many workers as it can have.

    Raises:
        ResourceError: there is no room for one with the fewest.
    """
    cluster.require_room(nodes, _bundles(config, fewest=True), data_cpus=data_cpus)
    return max(1, cluster.places(nodes, _bundles(config), data_cpus=data_cpus))


def _bundles(config: Config, *, fewest: bool = False) -> list[cluster.Resources]:
    """Return what a run takes with as many workers as it can have, or with the fewest."""
    workers = config.cluster.workers
    return cluster.run_bundles(
        config.cluster,
        config.cluster.cpus_per_worker or 1.0,
        workers.least if fewest else workers.most,
    )


def run_tags(session: Session, role: str) -> dict[str, str]:
    """Return the facts that every MLflow run carries."""
    rows = session.images.rows
    tags = {
        "raygkd.role": role,
        "raygkd.dataset": session.config.data.dataset,
        tracking.IMAGES_TAG: session.images.identity,
        "raygkd.split": ", ".join(f"{name} {len(rows[name])}" for name in ("train", "val", "test")),
        tracking.FOLDER_TAG: str(session.folder),
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
