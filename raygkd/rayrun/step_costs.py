"""Measure the cost of a training step of several runs on the same images."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

import ray
import torch

from raygkd import config as configuration
from raygkd.assembly.methods import uses_teacher
from raygkd.assembly.training import build_training
from raygkd.engine import measure_shares, training_step
from raygkd.engine.measure import MIB, interleaved, peak_bytes, state_bytes
from raygkd.models import ModelFile
from raygkd.rayrun.image_stream import RayStream, SharedImages

ROUNDS = 7
# name -> "seconds_per_step", "peak_mb", "step_ratio" and "peak_ratio"
Costs = dict[str, dict[str, float]]


def costs_of_steps(
    configs: Mapping[str, configuration.Config],
    reference: str,
    images: SharedImages,
    teacher: ModelFile | None,
    *,
    gpus: float,
) -> Costs:
    """Return name -> cost of a step of a run, on one batch of the images.

    "seconds_per_step" is a median over steps that take turns, and "peak_mb" the MiB that a run
    holds and a step needs besides, see ``raygkd.engine.measure``; "step_ratio" and "peak_ratio" are
    the ratios to the reference.

    Runs in this process or, if a GPU is requested and this process has none, in a task on a GPU
    node.

    Args:
        configs: name -> settings; all have the same batch size.
        reference: name of the run that the others are compared with.
        images: the shared images.
        teacher: if any of the runs needs it.
        gpus: per run.
    """
    plain = {name: configuration.to_mapping(config) for name, config in configs.items()}
    if not gpus or torch.cuda.is_available():
        return _measure(plain, reference, images, teacher)
    task = ray.remote(num_cpus=0, num_gpus=gpus)(_measure)
    return ray.get(task.remote(plain, reference, images, teacher))


def _measure(
    plain: Mapping[str, dict[str, Any]],
    reference: str,
    images: SharedImages,
    teacher: ModelFile | None,
) -> Costs:
    configs = {name: configuration.from_mapping(tree) for name, tree in plain.items()}
    optim = next(iter(configs.values())).optim
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stream = RayStream(
        images, batch_size=optim.batch_size, seed=0, epochs=range(1), rank=0, world_size=1
    )
    with contextlib.closing(stream):
        batch = next(iter(stream.train_batches(0)))
        steps, costs = {}, {}
        for name, config in configs.items():
            training = build_training(
                config,
                spec=images.spec,
                teacher_file=teacher if uses_teacher(config) else None,
                stream=stream,
                device=device,
            )
            training.objective.train()
            shown = training.shown(batch, 0)
            measure_shares(training, shown)
            steps[name] = functools.partial(training_step, training, shown)
            peak = peak_bytes(steps[name], device)
            costs[name] = {"peak_mb": (peak + state_bytes(training)) / MIB}
        timings = interleaved(steps, ROUNDS)
    for name, seconds in timings.medians.items():
        costs[name] |= {
            "seconds_per_step": seconds,
            "step_ratio": timings.ratio(name, reference),
            "peak_ratio": costs[name]["peak_mb"] / costs[reference]["peak_mb"],
        }
    return costs
