"""An open run: its folder, images, cluster and MLflow, which are always closed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from raygkd.assembly.methods import uses_teacher
from raygkd.assembly.models import new_model, start_from_weights
from raygkd.assembly.recipes import unused_cache
from raygkd.assembly.unlabelled_runs import student_class_names
from raygkd.config import Config, to_yaml, with_settings
from raygkd.data.run_images import Images, imbalance, open_images
from raygkd.data.spec import ImageSpec
from raygkd.errors import ConfigError, StorageError, UserError, to_paste
from raygkd.models import LoadedWeights, ModelFile
from raygkd.models.fake_quantised import QuantisedGraph
from raygkd.rayrun import cluster, image_stream, references, trainer, worker
from raygkd.rayrun.local_machine import check_limits, open_work, session_parent
from raygkd.rayrun.node_monitor import NodeWatch, require_shared
from raygkd.rayrun.stop_signal import StopFolder
from raygkd.report.console import progress
from raygkd.storage.atomic_files import Place, is_remote, place, write_text
from raygkd.storage.ownership import owned
from raygkd.tracking.left_runs import close_left_runs
from raygkd.tracking.redaction import shown
from raygkd.tracking.store import check_file, chosen_uri, connect, is_file
from raygkd.workflows.input_sizes import default_side, with_teacher_size
from raygkd.workflows.interrupts import Interrupts
from raygkd.workflows.pair_checks import starting_weights
from raygkd.workflows.preflight import (
    bundles_of,
    output_folder,
    require_one_truth,
    require_room,
    tell_what_is_removed,
    with_lasting_paths,
)
from raygkd.workflows.resume import (
    CONFIG,
    FACTS,
    RESULT,
    TRACKING,
    check_facts,
    new_run_folder,
    note_facts,
)

if TYPE_CHECKING:
    from raygkd.tracking.tracker import Tracker

# what MLflow has to take what is left
CLOSE_SECONDS = 4.0
# role of a run -> the command that makes it
COMMANDS = {"teacher": "teacher", "student": "train", "search": "tune", "comparison": "compare"}


@dataclass(kw_only=True)
class Session:
    """An open run and its resources.

    Attributes:
        config: the settings.
        folder: of this run, absolute.
        output: the output folder, absolute.
        nodes: resources of the cluster's nodes.
        images: the images; ``shared`` are the same in the object store.
        weights: "student" and "teacher" -> what they start from, where it is not random.
        tracker: MLflow.
        interrupts: Ctrl-C.
        console: for progress.
    """

    config: Config
    folder: Place
    output: Place
    nodes: list[cluster.Resources]
    images: Images
    shared: image_stream.SharedImages
    weights: Mapping[str, LoadedWeights]
    tracker: Tracker
    interrupts: Interrupts
    console: Console

    @property
    def data_cpus(self) -> float:
        """CPUs that the data stream needs in addition to training."""
        return _data_cpus(self.shared.decoded is None)

    def of_trial(self, params: Mapping[str, Any]) -> Session:
        """Return the session whose images are those of a trial with these settings."""
        images = dataclasses.replace(self.images, spec=self.images.spec.of_trial(params))
        return dataclasses.replace(self, images=images, shared=self.shared.of_trial(params))

    def with_teacher(self, name: str, weights: LoadedWeights | None) -> Session:
        """Return the session with another teacher.

        Args:
            name: of the teacher, as in ``--teacher``.
            weights: that it starts from; None for random ones.
        """
        others = {role: one for role, one in self.weights.items() if role != "teacher"}
        return dataclasses.replace(
            self,
            config=with_settings(self.config, {"teacher": name}),
            weights={**others, **({} if weights is None else {"teacher": weights})},
        )

    def job(
        self,
        config: Config,
        teacher: ModelFile | None,
        folder: Place,
        spec: ImageSpec | None = None,
        teachers: Mapping[str, ModelFile] | None = None,
        graph: QuantisedGraph | None = None,
    ) -> worker.Job:
        """Return a job for the training processes, on this run's images.

        Args:
            config: what to train.
            teacher: if the method needs one.
            folder: of the training.
            spec: what the model must know of the images; None for the student's.
            teachers: name -> teacher, of those that a search chooses from.
            graph: of a student that is trained in 8 bits; None in float.
        """
        shared = dataclasses.replace(self.shared, spec=spec or self.images.spec)
        return worker.make_job(
            config,
            shared,
            teacher,
            folder=folder,
            stop=self.interrupts.folder,
            teachers=teachers,
            graph=graph,
        )

    def student_weights(self, config: Config) -> LoadedWeights | None:
        """Return what the student of a training starts from; None for random weights.

        Args:
            config: of the training, which may have another student than the run.
        """
        name = config.model.student
        if name == self.config.model.student:
            return self.weights.get("student")
        spec = self.images.spec
        return start_from_weights(config, new_model(name, spec), len(spec.class_names))

    def cpus(self) -> float:
        """Return the CPUs per worker of a run that has the cluster to itself."""
        return cluster.worker_cpus(self.config.cluster, self.nodes, data_cpus=self.data_cpus)


def _data_cpus(streamed: bool) -> float:
    return image_stream.DATA_CPUS if streamed else 0.0


@contextlib.contextmanager
def open_session(
    config: Config,
    role: str,
    console: Console,
    resume: Place | None,
    check: Callable[[Images], Mapping[str, Any]],
) -> Iterator[Session]:
    """Open tracking, images and cluster, with the cheapest checks first; always close them.

    On an error, open MLflow runs end as FAILED, or as KILLED on Ctrl-C.

    Args:
        config: the settings.
        role: "teacher", "student", "search" or "comparison".
        console: for progress.
        resume: folder of the run to resume.
        check: refuses images that do not suit the models, before anything is started; returns
            the facts besides the images that must not change until a resume.

    Raises:
        UserError: anything that is missing or invalid, before anything is started.
    """
    started = time.monotonic()
    uri = chosen_uri(config.output.tracking_uri, config.output.output)
    output = output_folder(config.output.output)
    config = with_teacher_size(config)
    with contextlib.ExitStack() as stack:
        folder = _own_folder(stack, config, role, output, resume, console)
        # to join a cluster takes less than to prepare images, and to start one more than to look
        needs_ray = _needs_ray(config, role, 0.0)
        joined = _joined(config, output, uri, console, needs_ray=needs_ray)
        nodes = stack.enter_context(joined) or [cluster.local_node()]
        require_room(config, nodes, 0.0)
        connecting = stack.enter_context(_connected(uri, config.output.experiment, output))
        with progress(console, "preparing images") as advance:
            images = open_images(
                config.data,
                seed=config.optim.seed,
                output=output,
                progress=advance,
                default_side=default_side(config),
                class_names=student_class_names(config),
            )
        if note := imbalance(images):
            console.print(note, soft_wrap=True)
        if note := unused_cache(config):
            console.print(note, soft_wrap=True)
        facts = {"MLflow store": shown(uri), **_image_facts(images), **check(images)}
        weights = starting_weights(
            config,
            images.spec.of_teacher() if role == "teacher" else images.spec,
            console,
            with_teacher=_has_teacher(config, role),
            trained="teacher" if role == "teacher" else "student",
        )
        facts |= {f"{one}, starting weights": known.sha256 for one, known in weights.items()}
        if resume is not None and (moved := check_facts(folder, facts)) is not None:
            console.print(f"the run was moved here from {moved}", soft_wrap=True)
        data_cpus = _data_cpus(not image_stream.fits_in_memory(images, config.data.cache_mb))
        require_room(config, nodes, data_cpus)
        config = with_lasting_paths(config, output)
        interrupts = Interrupts(StopFolder(folder / "stop"), lambda line: console.print(line))
        stack.enter_context(interrupts.handled())
        if not cluster.is_joined(config.cluster.address) and _needs_ray(config, role, data_cpus):
            nodes = stack.enter_context(cluster.cluster(None))
        stack.enter_context(_unwrapped_user_errors())
        if data_cpus and not is_remote(images.table.path):
            require_shared("--data-dir", Path(images.table.path), Path(images.table.files[0]))
            if (others := config.data.unlabelled) is not None:
                require_shared("--unlabelled", Path(others), Path(images.table.files[-1]))
        with progress(console, "decoding images") as advance:
            shared = image_stream.share(images, config.data.cache_mb, advance)
        experiment = connecting.result()
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
            weights=weights,
            tracker=_tracker(uri, experiment, folder),
            interrupts=interrupts,
            console=console,
        )
        with _closing(session, role), _watched_nodes(session, role):
            yield session
    console.print(f"took {time.monotonic() - started:.0f} s")


def _own_folder(
    stack: contextlib.ExitStack,
    config: Config,
    role: str,
    output: Place,
    resume: Place | None,
    console: Console,
) -> Place:
    """Return the run's folder, which this process owns from now on; remove what others left.

    Raises:
        ResourceError: another process runs it.
        ConfigError: another process has begun it since this command looked for it.
    """
    folder = resume or new_run_folder(output, COMMANDS[role], config.output.name)
    stack.enter_context(owned(folder))
    if resume is None and (folder / FACTS).exists():
        raise ConfigError(
            f"{folder}: another process has begun this run meanwhile; run the command again to "
            "resume it"
        )
    tell_what_is_removed(folder, console)
    return folder


def _needs_ray(config: Config, role: str, data_cpus: float) -> bool:
    """Return whether a run on this machine alone needs Ray: for trials, workers, stream or cache.

    One process that trains models one after the other on images in memory does not.
    """
    is_single = role in ("teacher", "student") and trainer.is_here(config.cluster)
    return not is_single or data_cpus > 0 or worker.needs_cache(config)


def _has_teacher(config: Config, role: str) -> bool:
    """Return whether a run has a teacher."""
    return role != "teacher" and (role == "comparison" or uses_teacher(config))


@contextlib.contextmanager
def _connected(uri: str, experiment: str, output: Place) -> Iterator[Future[str]]:
    """Yield the id of the experiment, which a thread gets: MLflow takes seconds to import.

    A server that does not answer, and a file that is not a store, are noticed at once.
    """
    check_file(uri)
    pool = ThreadPoolExecutor(1, thread_name_prefix="mlflow-connect")
    try:
        found = pool.submit(_connect, uri, experiment, output)
        if not is_file(uri):
            found.result()
        yield found
    finally:
        pool.shutdown(wait=False)


def _connect(uri: str, experiment: str, output: Place) -> str:
    """Return the id of the experiment, in which runs of killed processes are closed."""
    found = connect(uri, experiment, output)
    close_left_runs(uri, found)
    return found


def _tracker(uri: str, experiment: str, folder: Place) -> Tracker:
    # takes seconds to import
    from raygkd.tracking.tracker import Tracker

    return Tracker(uri, experiment, folder / TRACKING)


@contextlib.contextmanager
def _joined(
    config: Config, output: Place, uri: str, console: Console, *, needs_ray: bool
) -> Iterator[list[cluster.Resources] | None]:
    """Join the running cluster, if one is given; yield its nodes, or None to start one.

    Raises:
        ResourceError: a limit of this machine is too low to start one, which is needed.
        UserError: the cluster does not answer, or its nodes do not share the run's output.
    """
    if not cluster.is_joined(config.cluster.address):
        if needs_ray:
            check_limits()
            session_parent()
        yield None
        return
    with cluster.cluster(config.cluster.address):
        nodes = cluster.wait_for_room(
            bundles_of(config, fewest=True),
            minutes=config.cluster.wait_minutes,
            tell=lambda line: console.print(line, soft_wrap=True),
        )
        if len(nodes) > 1 or config.cluster.wait_minutes:
            require_one_truth(output, uri)
        yield nodes


def _watched_nodes(session: Session, role: str) -> NodeWatch:
    """Return a watch that logs the load of every node to the command's MLflow run."""

    def record(load: dict[str, float], seconds: int) -> None:
        if session.tracker.is_open(role):
            session.tracker.metrics(role, load, step=seconds)

    return NodeWatch(record, lambda line: session.console.print(line, soft_wrap=True))


@contextlib.contextmanager
def _unwrapped_user_errors() -> Iterator[None]:
    """Raise a user error from a Ray task as itself, without Ray's traceback."""
    try:
        yield
    except UserError as error:
        if not references.is_open():
            raise
        from raygkd.rayrun.torch_trainer import raise_cause

        raise_cause(error)


def _image_facts(images: Images) -> dict[str, Any]:
    """Return facts that identify the data set and its version."""
    counts = {f"data set, {split} images": len(rows) for split, rows in images.rows.items()}
    spec = images.spec
    of_teacher = spec.of_teacher().image_size[0]
    return {
        **counts,
        **({"side of the teacher's input": of_teacher} if spec.image_size[0] != of_teacher else {}),
        "data set, classes": list(images.spec.class_names),
        "data set, side of the model input": images.spec.image_size[0],
        "data set, fingerprint of images and splits": images.identity,
    }


@contextlib.contextmanager
def _closing(session: Session, role: str) -> Iterator[None]:
    status = "FAILED"
    try:
        command = _resume_command(session.folder, role)
        close = functools.partial(session.tracker.close, "FAILED", timeout=CLOSE_SECONDS)
        with _with_resume_hint(session.folder, role), open_work(command, close):
            yield
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        session.console.print(f"stopped; resume with: {command}", soft_wrap=True)
        raise
    finally:
        session.tracker.close(status, timeout=CLOSE_SECONDS)


def _resume_command(folder: Place, role: str) -> str:
    return to_paste(COMMANDS[role], "--resume", folder)


@contextlib.contextmanager
def _with_resume_hint(folder: Place, role: str) -> Iterator[None]:
    """Add the command that resumes the run to errors of writing."""
    try:
        yield
    except StorageError as error:
        command = _resume_command(folder, role)
        remedy = f"once it can be written again, resume with: {command}"
        raise StorageError(f"{error}; {remedy}") from error


def write_result(result: Mapping[str, Any], role: str) -> None:
    """Write the result that ``--json`` prints to the run's folder, which marks the run finished.

    Raises:
        StorageError: it cannot be written.
    """
    folder = place(result["run"])
    with _with_resume_hint(folder, role):
        write_text(folder / RESULT, json.dumps(result, indent=2))
