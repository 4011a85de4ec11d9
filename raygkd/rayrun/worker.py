"""What runs inside a training process: build the run, train, hand metrics and checkpoints out."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray import ObjectRef
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raygkd import config as configuration
from raygkd.build import build_task, build_training, distils, normaliser, uses_teacher
from raygkd.config import Config
from raygkd.engine import Training, fit, read_checkpoint, restore, save_checkpoint
from raygkd.engine.tasks import pixels
from raygkd.models import ModelFile, build_from_file
from raygkd.rayrun.ingest import RayStream, SharedImages
from raygkd.rayrun.teacher_cache import TeacherCache, start_cache

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a training process is sent.

    Attributes:
        config: the run's settings as plain values.
        images: the shared images.
        teacher: reference to the teacher's ModelFile; None where the method needs none.
        teacher_cache: what is known of the teacher already; None to ask it every time.
    """

    config: dict[str, Any]
    images: SharedImages
    teacher: ObjectRef | None
    teacher_cache: TeacherCache | None = None

    def settings(self, changes: Mapping[str, Any] | None = None) -> Config:
        """Return the configuration, with the settings of a trial put in."""
        config = configuration.from_mapping(self.config)
        return configuration.with_settings(config, changes) if changes else config


def make_job(config: Config, images: SharedImages, teacher: ModelFile | None) -> Job:
    """Return a job whose teacher lies in the object store, and what it says, where it is kept."""
    limit = config.cluster.teacher_cache_mb << 20
    cached = limit > 0 and distils(config)
    return Job(
        config=configuration.to_mapping(config),
        images=images,
        teacher=ray.put(teacher) if teacher is not None else None,
        teacher_cache=start_cache(limit, config.method.levels) if cached else None,
    )


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
    stream = RayStream(
        job.images,
        batch_size=config.optim.batch_size // world_size,
        seed=config.optim.seed,
        epochs=range(first_epoch, config.optim.epochs),
        rank=rank,
        world_size=world_size,
    )
    teacher = ray.get(job.teacher) if job.teacher is not None else None
    cache = job.teacher_cache if distils(config) else None
    return build_training(
        config,
        spec=job.images.spec,
        teacher_file=teacher if uses_teacher(config) else None,
        stream=stream,
        device=device,
        rank=rank,
        parallel=parallel,
        begun=begun,
        teacher_store=cache.open(repeats=stream.repeats) if cache is not None else None,
    )


def train_worker(job: Job) -> None:
    """Run one rank of a TorchTrainer: every epoch is reported with a checkpoint of rank 0."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    checkpoint = ray.train.get_checkpoint()
    state = None
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            state = read_checkpoint(Path(folder) / CHECKPOINT)
    training = make_training(
        job,
        job.settings(),
        device=device,
        rank=rank,
        world_size=world_size,
        first_epoch=state["epoch"] if state else 0,
        parallel=_parallel(device, world_size),
    )
    if state:
        restore(training, state)
    fit(training, _report)
    training.stream.close()


def _parallel(device: torch.device, world_size: int) -> Callable[[nn.Module], nn.Module]:
    if world_size == 1:
        return lambda module: module
    ids = [device] if device.type == "cuda" else None
    return lambda module: DistributedDataParallel(module, device_ids=ids)


def _report(metrics: dict[str, float], training: Training) -> None:
    import ray.train

    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder) / CHECKPOINT, training)
        checkpoint = ray.train.Checkpoint.from_directory(folder) if training.rank == 0 else None
        ray.train.report(metrics, checkpoint=checkpoint)


def score_models(
    models: Mapping[str, ModelFile],
    images: SharedImages,
    split: str,
    *,
    batch_size: int,
    gpus: float,
) -> dict[str, dict[str, Any]]:
    """Return name -> scores of saved models (see ``Task.score``), each in a task of its own.

    Args:
        models: name -> model file.
        images: the shared images.
        split: which of them.
        batch_size: images at a time.
        gpus: GPUs of each task, 0 to 1.
    """
    # the tasks take no CPU: as many of them as there are CPUs would leave none for their streams
    task = ray.remote(num_cpus=0, num_gpus=gpus)(score)
    waiting = {
        name: task.remote(model, images, split, batch_size) for name, model in models.items()
    }
    return {name: ray.get(reference) for name, reference in waiting.items()}


def score(
    model_file: ModelFile, images: SharedImages, split: str, batch_size: int
) -> dict[str, Any]:
    """Return what ``Task.score`` does, of a saved model on a split, in this process alone."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stream = RayStream(images, batch_size=batch_size, seed=0, epochs=range(0), rank=0, world_size=1)
    normalise = normaliser(model_file.mean, model_file.std, device)
    return build_task(images.spec, stream.boxes).score(
        build_from_file(model_file).to(device),
        stream.eval_batches(split),
        lambda batch: normalise(pixels(batch, device)),
    )
