"""Code of a training process: build the run, train, and report metrics and checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raygkd import config as configuration
from raygkd.assembly.methods import distils, share_of_epoch, uses_teacher
from raygkd.assembly.recipes import views_of
from raygkd.assembly.training import build_task, build_training
from raygkd.config import Config
from raygkd.engine import Training, read_checkpoint, restore, run_epoch, save_checkpoint
from raygkd.errors import DataError, Diverged, Stopped
from raygkd.models import ModelFile
from raygkd.models.fake_quantised import QuantisedGraph
from raygkd.rayrun import references
from raygkd.rayrun.finished_models import here_or_on_gpu, model_on_images
from raygkd.rayrun.image_stream import RayStream, SharedImages
from raygkd.rayrun.references import Reference
from raygkd.rayrun.step_progress import StepFile, StepReport
from raygkd.rayrun.stop_signal import StopFolder, StopPoll
from raygkd.storage.atomic_files import Place
from raygkd.storage.journal import open_journal

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from raygkd.rayrun.mailbox import Order
    from raygkd.rayrun.teacher_cache import TeacherCache

Epochs = Generator[dict[str, float], None, None]
CHECKPOINT = "checkpoint.pt"
# the metrics of every epoch, a line each
JOURNAL = "metrics.jsonl"
METRICS = dict[str, float | bool | None]
# what a training is judged by, and a search ranks its trials by
METRIC = "val_score"
# what a trial scores whose loss is not finite: below any accuracy, and a number that can be ranked
DIVERGED = {METRIC: 0.0, "diverged": 1.0}


@dataclass(frozen=True, kw_only=True)
class Job:
    """The job of a training process.

    Attributes:
        config: the run's settings as plain values.
        images: the shared images.
        teacher: reference to the teacher's ModelFile; None where the method needs none.
        teachers: name -> reference, of the teachers that a search chooses from.
        folder: of the run, absolute and on storage that all nodes share; it has the checkpoint,
            and its name is that of the run.
        stop: folder of stop requests.
        teacher_cache: cached outputs of the teacher; None to always compute them.
        graph: reference to the QuantisedGraph of a student that is trained in 8 bits.
    """

    config: dict[str, Any]
    images: SharedImages
    teacher: Reference | None
    folder: Place
    stop: StopFolder
    teacher_cache: TeacherCache | None = None
    teachers: Mapping[str, Reference] = field(default_factory=dict)
    graph: Reference | None = None

    def settings(self, changes: Mapping[str, Any] | None = None) -> Config:
        """Return the configuration with the settings of a trial applied."""
        config = configuration.from_mapping(self.config)
        return configuration.with_settings(config, changes) if changes else config

    def of_trial(self, number: int, changes: Mapping[str, Any]) -> Job:
        """Return the job of one trial of this run, with its settings and its own folder."""
        return dataclasses.replace(
            self,
            config=configuration.to_mapping(self.settings(changes)),
            images=self.images.of_trial(changes),
            teacher=self.teachers.get(changes.get("teacher", ""), self.teacher),
            folder=trial_folder(self.folder, number),
        )


@dataclass(frozen=True, kw_only=True)
class ServedTrials:
    """The job of the workers of a trainer that trains one trial after the other.

    Attributes:
        job: of every trial, before its settings are applied.
        mailbox: the source of orders, a ``Mailbox``.
    """

    job: Job
    mailbox: ActorHandle


def trial_folder(folder: Place, number: int) -> Place:
    """Return the folder of a trial inside that of its search."""
    return folder / "trials" / f"{number:04d}"


def make_job(
    config: Config,
    images: SharedImages,
    teacher: ModelFile | None,
    *,
    folder: Place,
    stop: StopFolder,
    teachers: Mapping[str, ModelFile] | None = None,
    graph: QuantisedGraph | None = None,
) -> Job:
    """Return a job whose teacher is in the object store, with its cache if there is one.

    Args:
        config: the run's settings.
        images: the shared images.
        teacher: if the method needs one.
        folder: of the run.
        stop: folder of stop requests.
        teachers: name -> teacher, of those that a search chooses from.
    """
    cache = None
    if needs_cache(config):
        from raygkd.rayrun.teacher_cache import start_cache

        cache = start_cache(config.cluster.teacher_cache_mb << 20, config.method.levels)
    return Job(
        config=configuration.to_mapping(config),
        images=images,
        teacher=references.put(teacher) if teacher is not None else None,
        folder=folder,
        stop=stop,
        teacher_cache=cache,
        teachers={name: references.put(one) for name, one in (teachers or {}).items()},
        graph=references.put(graph) if graph is not None else None,
    )


def needs_cache(config: Config) -> bool:
    """Return whether the teacher's outputs are cached, by an actor of the cluster."""
    return config.cluster.teacher_cache_mb > 0 and distils(config)


def make_training(
    job: Job,
    config: Config,
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    first_epoch: int = 0,
    parallel: Callable[[nn.Module], nn.Module] = lambda module: module,
) -> Training:
    """Return a run of one rank whose stream starts at ``first_epoch``."""
    begun = time.perf_counter()
    views = views_of(config.recipe)
    stream = RayStream(
        job.images,
        batch_size=config.optim.batch_size // world_size,
        seed=config.optim.seed,
        epochs=range(first_epoch, config.optim.epochs),
        rank=rank,
        world_size=world_size,
        views=views,
        unlabelled_share=share_of_epoch(config, job.images.spec),
        skips_unlabelled=not distils(config),
    )
    teacher = references.get(job.teacher) if job.teacher is not None else None
    store = None
    cache = job.teacher_cache if distils(config) else None
    if cache is not None:
        store = cache.open(
            teacher=config.model.teacher,
            seed=config.optim.seed,
            augment=job.images.augment or job.images.spec.augment,
            views=views,
            repeats=stream.repeats,
        )
    return build_training(
        config,
        spec=job.images.spec,
        teacher_file=teacher if uses_teacher(config) else None,
        stream=stream,
        device=device,
        rank=rank,
        parallel=parallel,
        begun=begun,
        teacher_store=store,
        graph=references.get(job.graph) if job.graph is not None else None,
    )


def run_epochs(
    job: Job,
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    parallel: Callable[[nn.Module], nn.Module] = lambda module: module,
    on_step: Callable[[Training], None] = lambda training: None,
) -> Epochs:
    """Train a run, from its checkpoint if it has one; yield the metrics of every epoch.

    They are those of the training loop and "workers", the current number of workers. A checkpoint
    is written before its epoch is reported, so the first metrics of a resumed run are those of its
    checkpoint, which may not have been reported before. On a stop request the run writes a
    checkpoint after the step, answers, and waits to be stopped. ``on_step`` is called after each
    step.

    Raises:
        Diverged: the loss is not finite.
        StorageError: the checkpoint cannot be written.
        UserError: a user error that only shows in training.
    """
    config = job.settings()
    path = job.folder / CHECKPOINT
    state = read_checkpoint(path) if path.exists() else None
    training = make_training(
        job,
        config,
        device=device,
        rank=rank,
        world_size=world_size,
        first_epoch=state["epoch"] if state else 0,
        parallel=parallel,
    )
    try:
        if state:
            _restore(training, state, job.folder)
        told = {"workers": float(world_size)}
        if training.metrics:
            yield training.metrics | told
        must_stop = StopPoll(job.stop)
        while not training.is_over:
            run_epoch(training, must_stop, on_step)
            save_checkpoint(path, training)
            yield training.metrics | told
    except Stopped:
        # a part of an epoch can only be resumed by as many workers
        if not config.cluster.workers.is_elastic:
            save_checkpoint(path, training)
        if rank == 0:
            job.stop.answer(job.folder.name)
        # the driver ends this process
        threading.Event().wait()
    finally:
        training.stream.close()


def next_result(epochs: Epochs) -> dict[str, float]:
    """Return the result of a trial's next epoch, and whether it diverged."""
    try:
        return {**next(epochs), "diverged": 0.0}
    except Diverged as error:
        return {**DIVERGED, "epoch": error.epoch}


def train_worker(job: Job) -> None:
    """Run one rank of a TorchTrainer, and report every epoch."""
    import ray.train

    is_first = ray.train.get_context().get_world_rank() == 0
    steps = StepFile(job.folder)
    report = StepReport(steps.write, job.settings().optim.batch_size, steps.seconds)
    epochs = _epochs_of_rank(job, report) if is_first else _epochs_of_rank(job)
    # here and not in the controller: it misses reports that wait while workers are replaced
    for metrics in journalled(epochs, job.folder) if is_first else epochs:
        ray.train.report(metrics)


def journalled(epochs: Iterable[dict[str, float]], folder: Place) -> Epochs:
    """Yield the metrics of epochs, each once it is in the journal of the run's folder."""
    journal = open_journal(folder / JOURNAL)
    for metrics in epochs:
        # a resumed run begins with the epoch of its checkpoint
        if len(journal.lines()) < metrics["epoch"]:
            journal.append(json.dumps(metrics))
        yield metrics


def serve_trials(served: ServedTrials) -> None:
    """Run one rank of a TorchTrainer that trains trial after trial, one epoch per order.

    Errors that occur on all ranks are returned as answers; errors on a single rank end the trainer.
    """
    import ray
    import ray.train

    is_elastic = served.job.settings().cluster.workers.is_elastic
    order = _order_of_rank_0(served.mailbox)
    while order is not None:
        trial = order.trial
        with contextlib.closing(_epochs_of_rank(served.job.of_trial(*order))) as epochs:
            while order is not None and order.trial == trial:
                result = next_result(epochs)
                if torch.distributed.get_rank() == 0:
                    ray.get(served.mailbox.answer.remote(result))
                if is_elastic:
                    # tells the controller that an epoch is over
                    ray.train.report({})
                order = _order_of_rank_0(served.mailbox)


def _restore(training: Training, state: dict[str, Any], folder: Place) -> None:
    """Restore a run from its checkpoint; see ``restore``."""
    try:
        restore(training, state)
    except DataError as error:
        raise DataError(f"{folder}: {error}; remove the folder to train anew") from error


def _order_of_rank_0(mailbox: ActorHandle) -> Order | None:
    """Return the next order, as received by rank 0, on all ranks."""
    import ray

    is_first = torch.distributed.get_rank() == 0
    orders = [ray.get(mailbox.order.remote()) if is_first else None]
    torch.distributed.broadcast_object_list(orders, src=0)
    return orders[0]


def _epochs_of_rank(
    job: Job, on_step: Callable[[Training], None] = lambda training: None
) -> Epochs:
    """Return the epochs of a run as a rank of a TorchTrainer trains it."""
    return run_epochs(job, **this_rank()._asdict(), on_step=on_step)


class Rank(NamedTuple):
    """A rank: its number, the number of ranks, its device, and the wrapper of modules."""

    rank: int
    world_size: int
    device: torch.device
    parallel: Callable[[nn.Module], nn.Module]


def this_rank() -> Rank:
    """Return the rank of the calling worker of a TorchTrainer."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    device, world_size = ray.train.torch.get_device(), context.get_world_size()
    return Rank(context.get_world_rank(), world_size, device, _parallel(device, world_size))


def _parallel(device: torch.device, world_size: int) -> Callable[[nn.Module], nn.Module]:
    if world_size == 1:
        return lambda module: module
    ids = [device] if device.type == "cuda" else None

    def wrapped(module: nn.Module) -> nn.Module:
        return DistributedDataParallel(
            module, device_ids=ids, find_unused_parameters=not getattr(module, "trains_all", True)
        )

    return wrapped


def score_models(
    models: Mapping[str, ModelFile],
    images: SharedImages,
    split: str,
    *,
    batch_size: int,
    gpus: float,
    progress: Callable[[int, int], None],
) -> dict[str, dict[str, Any]]:
    """Return name -> scores of saved models (see ``Task.score``), with those of every image.

    Runs in this process, which saves a start; if a GPU is requested and this process has none, each
    model is scored in a task on a GPU node.

    Args:
        models: name -> model file.
        images: the shared images.
        split: which of them.
        batch_size: images at a time.
        gpus: per model, 0 to 1.
        progress: is called with the models done and their number.
    """
    found: dict[str, dict[str, Any]] = {}
    progress(0, len(models))
    start = here_or_on_gpu(score, gpus)
    waiting = {name: start(model, images, split, batch_size) for name, model in models.items()}
    for name, result in waiting.items():
        found[name] = result()
        progress(len(found), len(models))
    return found


def score(
    model_file: ModelFile, images: SharedImages, split: str, batch_size: int
) -> dict[str, Any]:
    """Return ``Task.score`` of a saved model on a split, in this process."""
    with model_on_images(model_file, images, batch_size) as (model, stream, inputs):
        return build_task(images.spec, stream).score(
            model, stream.eval_batches(split), inputs, by_image=True
        )
