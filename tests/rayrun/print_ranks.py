"""A job: waits for two nodes, trains an epoch there, and prints what each worker ends with.

Submitted with this folder as its working directory, and the output folder as its argument.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import ray
import ray.train
from ray.train.torch import get_device
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from raygkd.config import ClusterConfig, Config, WorkerRange, with_settings
from raygkd.data.run_images import open_images
from raygkd.engine import run_epoch
from raygkd.rayrun.cluster import cluster, run_bundles, wait_for_room
from raygkd.rayrun.image_stream import share
from raygkd.rayrun.stop_signal import StopFolder
from raygkd.rayrun.torch_trainer import torch_trainer
from raygkd.rayrun.worker import Job, make_job, make_training

SETTINGS = {"method": "none", "limit_train": 256, "epochs": 1, "augment": "none"}


@dataclass(frozen=True)
class Ranks:
    """What the workers are sent."""

    job: Job
    folder: Path


def digest(tensors: Iterable[Tensor]) -> str:
    """Return 16 digits that stand for the bits of tensors."""
    known = hashlib.sha256()
    for tensor in tensors:
        known.update(tensor.detach().numpy().tobytes())
    return known.hexdigest()[:16]


def train(ranks: Ranks) -> None:
    """Train, and write down where and what it came to."""
    context = ray.train.get_context()
    rank = context.get_world_rank()
    training = make_training(
        ranks.job,
        ranks.job.settings(),
        device=get_device(),
        rank=rank,
        world_size=context.get_world_size(),
        parallel=DistributedDataParallel,
    )
    stream = digest(batch["image"] for batch in training.stream.train_batches(0))
    before = digest(training.objective.student.parameters())
    run_epoch(training)
    student = training.objective.student
    told = {
        "node": ray.util.get_node_ip_address(),
        "images": stream,
        "weights before": before,
        "gradients": digest(p.grad for p in student.parameters() if p.grad is not None),
        "weights": digest(student.parameters()),
    }
    (ranks.folder / f"{rank}.json").write_text(json.dumps(told))


def main(output: Path) -> None:
    """Train on the cluster of this job."""
    config = with_settings(Config(), SETTINGS)
    images = open_images(config.data, seed=0, output=output)
    folder = output / "ranks"
    folder.mkdir()
    workers = ClusterConfig(workers=WorkerRange(2, 2))
    with cluster(None):
        room = run_bundles(workers, 1.0, 2)
        wait_for_room(room, minutes=3, tell=lambda line: print(line, flush=True))
        job = make_job(
            config, share(images, 1024), None, folder=folder, stop=StopFolder(folder / "stop")
        )
        torch_trainer(
            train, Ranks(job, folder), folder, workers, cpus=1.0, batch_size=config.optim.batch_size
        ).fit()
    for path in sorted(folder.glob("*.json")):
        print(path.read_text())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
