"""The same DDP loop under Ray Train and under torchrun.

``torchrun --nproc-per-node 2 -m raygkd.bench.ddp STEPS EPOCHS`` prints what rank 0 measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raygkd.bench.runs import SameBatch, classes_spec, make_training, random_batch
from raygkd.engine import run_epoch
from raygkd.errors import RunFailed

# images of 16 x 16 pixels, of which each of two workers takes half
BATCH, SIDE, RANKS = 64, 16, 2
SETTINGS = {"teacher": "resnet20", "student": "resnet8", "method": "graph", "batch_size": BATCH}


def seconds_of_epochs(
    steps: int,
    epochs: int,
    rank: int,
    world_size: int,
    device: torch.device,
    parallel: Callable[[nn.Module], nn.Module],
) -> list[float]:
    """Return the seconds of each epoch of a rank, without the first, which includes the warm-up."""
    spec = classes_spec(10, SIDE)
    stream = SameBatch(random_batch(BATCH // world_size, spec), steps_per_epoch=steps)
    settings = {**SETTINGS, "epochs": epochs}
    training = make_training(settings, spec, stream, device, rank=rank, parallel=parallel)
    seconds = []
    for _ in range(epochs):
        started = time.perf_counter()
        run_epoch(training)
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def under_torchrun(steps: int, epochs: int) -> list[float]:
    """Return ``seconds_of_epochs`` of rank 0 of two processes that torchrun starts.

    Raises:
        RunFailed: torchrun failed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(RANKS), "-m", "raygkd.bench.ddp", str(steps), str(epochs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunFailed(f"torchrun ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run one rank of torchrun's; the first prints its seconds."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    is_gpu = torch.cuda.device_count() >= world_size
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if is_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if is_gpu else "gloo")
    try:
        steps, epochs = map(int, sys.argv[1:])
        seconds = seconds_of_epochs(
            steps, epochs, rank, world_size, device, DistributedDataParallel
        )
    finally:
        dist.destroy_process_group()
    if rank == 0:
        print(json.dumps(seconds))


if __name__ == "__main__":
    main()
