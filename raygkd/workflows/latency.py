"""How long models take for one image on this machine's CPU.

Shapes: B images, C channels, H height, W width.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from raygkd.report.sizes import Latency

# runs of each model that do not count, and the fewest and most that do
WARM_UP, FEWEST, MOST = 3, 20, 200
# after which no more are begun than the fewest
SECONDS = 10.0


@torch.no_grad()
def latencies(
    models: Mapping[str, tuple[nn.Module, Tensor]], progress: Callable[[int, int], None]
) -> dict[str, Latency]:
    """Return how long each model takes for one image.

    The models take turns, so that what else the machine does meets all alike, and each turn has the
    next of the images.

    Args:
        models: name -> model in eval mode, and its normalised images (B, C, H, W).
        progress: is told turns done and their number.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    begun = time.perf_counter()
    for turn in range(-WARM_UP, MOST):
        if turn >= FEWEST and time.perf_counter() - begun > SECONDS:
            break
        for name, (model, images_BCHW) in models.items():
            number = turn % len(images_BCHW)
            started = time.perf_counter()
            model(images_BCHW[number : number + 1])
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


def hardware() -> str:
    """Return what ``latencies`` runs on: the CPU, its cores that this process has, and threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{_cpu_name()}, {cores} core(s), {torch.get_num_threads()} thread(s), float32, "
        f"torch {torch.__version__}"
    )


def _cpu_name() -> str:
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        for line in facts.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
