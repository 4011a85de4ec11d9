"""How long models take on this machine.

Shapes: B images, R images of a run, C channels, H height, W width.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# runs of each model that do not count, and the fewest and most that do
WARM_UP, FEWEST, MOST = 3, 20, 200
# after which no more are begun than the fewest
SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Latency:
    """How long a model takes.

    Attributes:
        median, p95: milliseconds, of all runs.
        runs: how many there were.
    """

    median: float
    p95: float
    runs: int


@torch.no_grad()
def latencies(
    models: Mapping[str, tuple[Callable[[Tensor], Any], Tensor]],
    progress: Callable[[int, int], None],
    *,
    batch: int = 1,
    fewest: int = FEWEST,
) -> dict[str, Latency]:
    """Return how long each model takes for some images.

    The models take turns, so that what else the machine does meets all alike, and each turn has the
    next of the images.

    Args:
        models: name -> model in eval mode, whose output is there when it returns, and the images
            (B, C, H, W) that it takes.
        progress: is called with the turns done and their number.
        batch: R.
        fewest: turns, whatever they take.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    begun = time.perf_counter()
    for turn in range(-WARM_UP, MOST):
        if turn >= fewest and time.perf_counter() - begun > SECONDS:
            break
        for name, (model, images_BCHW) in models.items():
            numbers = [(turn * batch + one) % len(images_BCHW) for one in range(batch)]
            images_RCHW = images_BCHW[numbers]
            started = time.perf_counter()
            model(images_RCHW)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - started)
        progress(max(0, turn + 1), MOST)
    return {
        name: Latency(
            median=1000 * float(np.median(runs)),
            p95=1000 * float(np.percentile(runs, 95)),
            runs=len(runs),
        )
        for name, runs in seconds.items()
    }


def hardware(device: torch.device | str = "cpu") -> str:
    """Return what a model runs on: a GPU, or the CPU with the cores and threads that it has."""
    device = torch.device(device)
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, float32, torch {torch.__version__}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{cpu_name()}, {cores} core(s), {torch.get_num_threads()} thread(s), float32, "
        f"torch {torch.__version__}"
    )


def cpu_name() -> str:
    """Return the processor's name, if the system reports it."""
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        for line in facts.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
