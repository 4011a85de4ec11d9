"""Run functions in the workers of a TorchTrainer, or in a trial that starts one, to time them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ray import tune
from torch import nn

from raygkd.config import ClusterConfig, WorkerRange
from raygkd.errors import RunFailed
from raygkd.rayrun.torch_trainer import torch_trainer
from raygkd.rayrun.worker import this_rank
from raygkd.storage.atomic_files import place

Parallel = Callable[[nn.Module], nn.Module]
# of rank, world size, device, and what wraps a module for several ranks; its result is plain values
OnRank = Callable[[int, int, torch.device, Parallel], Any]
_RESULT = "result.json"
# of a trial that waits for its workers
_WAITING_CPUS = 0.1


def on_workers(function: OnRank, folder: Path, *, workers: int, cpus: float = 1.0) -> Any:
    """Run a function on every rank of a TorchTrainer; return the result of rank 0.

    Args:
        function: for all ranks.
        folder: for this run only.
        workers: number of ranks.
        cpus: per rank.
    """
    path = folder / _RESULT

    def loop(_: Any) -> None:
        this = this_rank()
        result = function(*this)
        if this.rank == 0:
            path.write_text(json.dumps(result))

    cluster = ClusterConfig(workers=WorkerRange(workers, workers), max_failures=0)
    torch_trainer(loop, {}, place(str(folder)), cluster, cpus=cpus, batch_size=workers).fit()
    return json.loads(path.read_text())


def seconds_to_nested_step(step: Callable[[], None], folder: Path) -> float:
    """Return the seconds from the start of a Tune trial to a step in its trainer.

    Args:
        step: function for the one worker.
        folder: for this run only.
    """

    def on_rank(*_: Any) -> float:
        step()
        return time.time()

    def trial(_: dict[str, Any]) -> None:
        started = time.time()
        over = on_workers(on_rank, folder, workers=1)
        tune.report({"seconds": over - started})

    results = tune.Tuner(
        tune.with_resources(trial, {"CPU": _WAITING_CPUS}),
        run_config=tune.RunConfig(name="nested", storage_path=str(folder), verbose=0),
    ).fit()
    if results.errors:
        raise RunFailed(f"a nested trial failed: {results.errors[0]}")
    return float(results[0].metrics["seconds"])
