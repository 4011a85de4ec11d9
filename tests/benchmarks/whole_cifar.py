"""Every method on all of CIFAR-10, on a GPU and without Ray, MLflow or pyarrow.

    python tests/benchmarks/whole_cifar.py pack cifar10.parquet images.npz
    PYTHONPATH=. python tests/benchmarks/whole_cifar.py run images.npz --output results.jsonl

The first command needs pyarrow; the second runs, from a checkout, where there are torch,
torchvision, NumPy, Pillow and PyYAML. It trains a teacher, then a student by each method, several
processes at a time on one GPU, and writes a line for each of them. The images are on the GPU, and
are padded by 4 pixels, cropped and flipped there; all methods have the same teacher, split and
recipe.

Shapes: B batch, N images.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from raygkd.assembly.models import student_file, untrained_file
from raygkd.assembly.student_objective import build_objective
from raygkd.assembly.training import build_training
from raygkd.config import Config, with_settings
from raygkd.data.seeds import generator
from raygkd.data.spec import ImageSpec
from raygkd.engine import Training, evaluate, run_epoch
from raygkd.errors import ConfigError
from raygkd.models import ModelFile, build_from_file, load_model_file, save_model_file

PADDING, VALIDATION = 4, 5000
SPEC = ImageSpec(
    class_names=tuple("0123456789"),
    image_size=(32, 32),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    augment="crop",
)
# what says most comes first, should there be no time for all of it
METHODS = (
    *("graph", "none", "kd", "fitnet", "graph+kd", "dist", "vid", "sp", "at", "dkd", "pkt"),
    *("ickd", "rkd", "logit-std"),
)


class GpuStream:
    """The images on a GPU (the ``Stream`` of the training loop).

    Args:
        images: what ``decoded`` gives.
        batch_size: images of a batch.
        seed: of order and augmentation.
        device: where they are.
    """

    bad_images = 0
    boxes = None

    def __init__(
        self, images: Mapping[str, Tensor], batch_size: int, seed: int, device: torch.device
    ):
        self._splits = {}
        for split in ("train", "val", "test"):
            rows = images[split]
            pixels, labels = images["pixels"][rows].to(device), images["labels"][rows].to(device)
            self._splits[split] = pixels, labels
        self._batch_size, self._seed, self._device = batch_size, seed, device

    @property
    def steps_per_epoch(self) -> int:
        """How many whole batches there are."""
        return len(self._splits["train"][1]) // self._batch_size

    def train_batches(self, epoch: int) -> Iterator[dict[str, Tensor]]:
        """Yield batches in an order of the epoch, augmented."""
        pixels, labels = self._splits["train"]
        random = torch.Generator().manual_seed(1000 * self._seed + epoch)
        order = torch.randperm(len(labels), generator=random).to(self._device)
        for rows in order[: self.steps_per_epoch * self._batch_size].split(self._batch_size):
            yield {"image": augmented(pixels[rows], random), "label": labels[rows]}

    def eval_batches(self, split: str) -> Iterator[dict[str, Tensor]]:
        """Yield a split as it is."""
        for pixels, labels in zip(*(part.split(1000) for part in self._splits[split]), strict=True):
            yield {"image": pixels, "label": labels}

    def close(self) -> None:
        """Nothing reads ahead."""


def augmented(images_B3HW: Tensor, random: torch.Generator) -> Tensor:
    """Return images shifted by up to 4 pixels, half of them flipped; what is beyond is black."""
    size, _, height, width = images_B3HW.shape
    padded = F.pad(images_B3HW, (PADDING,) * 4)
    shifts_B2 = torch.randint(0, 2 * PADDING + 1, (size, 2), generator=random)
    flips_B1 = torch.rand(size, 1, generator=random) < 0.5
    rows_BH = shifts_B2[:, :1] + torch.arange(height)
    columns_BW = torch.arange(width).expand(size, -1)
    columns_BW = shifts_B2[:, 1:] + torch.where(flips_B1, width - 1 - columns_BW, columns_BW)
    rows_BH, columns_BW = rows_BH.to(padded.device), columns_BW.to(padded.device)
    batch = torch.arange(size, device=padded.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows_BH[:, :, None], columns_BW[:, None]].permute(
        0, 3, 1, 2
    )


def pack(source: str, target: str) -> None:
    """Write the encoded images of Parquet shards as one NumPy file."""
    from pyarrow import parquet

    table = parquet.read_table(source)
    encoded = table.column("image").to_pylist()
    np.savez_compressed(
        target,
        bytes=np.frombuffer(b"".join(encoded), dtype=np.uint8),
        ends=np.cumsum([len(image) for image in encoded]),
        labels=table.column("label").to_numpy().astype(np.int64),
        is_test=np.array(table.column("split").to_pylist()) == "test",
    )


def decoded(packed: str, pool: Executor) -> dict[str, Tensor]:
    """Return "pixels" uint8 (N, 3, 32, 32), "labels" (N,), and the rows of each split."""
    with np.load(packed) as arrays:
        data, ends = arrays["bytes"].tobytes(), arrays["ends"].tolist()
        labels, is_test = torch.from_numpy(arrays["labels"]), arrays["is_test"]
    encoded = [data[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
    pixels = np.stack(list(pool.map(_pixels, encoded, chunksize=1000)))
    training = generator(0).permutation(np.flatnonzero(~is_test))
    return {
        "pixels": torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        "labels": labels,
        "train": torch.from_numpy(training[VALIDATION:].copy()),
        "val": torch.from_numpy(training[:VALIDATION].copy()),
        "test": torch.from_numpy(np.flatnonzero(is_test)),
    }


def _pixels(encoded: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def trained(
    images: Mapping[str, Tensor], settings: Mapping[str, Any], teacher: ModelFile | None
) -> tuple[Training, dict[str, Any]]:
    """Return a run after its last epoch, and what is told of it."""
    started = time.perf_counter()
    config = with_settings(Config(), {"warmup_epochs": 0.5, **settings})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    training = build_training(
        config,
        spec=SPEC,
        teacher_file=teacher,
        stream=GpuStream(images, config.optim.batch_size, config.optim.seed, device),
        device=device,
    )
    scores = [run_epoch(training)["val_score"] for _ in range(config.optim.epochs)]
    return training, {
        "method": config.method.method,
        "student": config.model.student,
        "seed": config.optim.seed,
        "epochs": config.optim.epochs,
        "test": evaluate(training, "test")["score"],
        "val": scores,
        "seconds": time.perf_counter() - started,
    }


def _student(images: str, teacher: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    file = load_model_file(teacher)
    return trained(torch.load(images, weights_only=True), settings, file)[1]


def run(asked: argparse.Namespace) -> None:
    """Train the teacher and the students; tell each as it ends."""
    shared = {"batch_size": asked.batch_size, "lr": asked.lr}
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        Path(asked.output).open("a") as output,
        ProcessPoolExecutor(asked.at_once, mp_context=spawn) as pool,
    ):

        def tell(found: Mapping[str, Any]) -> None:
            output.write(json.dumps(found) + "\n")
            output.flush()
            print(json.dumps(found), flush=True)

        # a package that a method needs is asked for now, not after hours
        untrained = build_from_file(untrained_file(asked.teacher, SPEC))
        for method in asked.methods:
            settings = {"method": method, "teacher": asked.teacher, "student": asked.student}
            build_objective(with_settings(Config(), settings), SPEC, untrained)
        images = decoded(asked.images, pool)
        settings = {"method": "none", "epochs": asked.teacher_epochs, "student": asked.teacher}
        training, found = trained(images, shared | settings, None)
        tell(found)
        state = training.objective.student.state_dict()
        file = student_file(with_settings(Config(), settings), SPEC, state, {"test": found["test"]})
        teacher, stored = Path(folder) / "teacher.pt", Path(folder) / "images.pt"
        save_model_file(teacher, file)
        torch.save(images, stored)
        shared |= {"epochs": asked.epochs, "teacher": asked.teacher, "student": asked.student}
        work = functools.partial(_student, str(stored), str(teacher))
        runs = [
            pool.submit(work, shared | {"method": method, "seed": seed})
            for seed in range(asked.seeds)
            for method in asked.methods
        ]
        for done in as_completed(runs):
            tell(done.result())


def main() -> None:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("source")
    packing.add_argument("target")
    running = commands.add_parser("run")
    running.add_argument("images")
    running.add_argument("--output", required=True)
    running.add_argument("--teacher", default="resnet32x4")
    running.add_argument("--student", default="resnet8x4")
    running.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    running.add_argument("--teacher-epochs", type=int, default=240)
    running.add_argument("--epochs", type=int, default=240)
    running.add_argument("--batch-size", type=int, default=128)
    running.add_argument("--lr", type=float, default=0.1)
    running.add_argument("--seeds", type=int, default=3)
    running.add_argument("--at-once", type=int, default=6)
    asked = parser.parse_args()
    try:
        if asked.command == "pack":
            pack(asked.source, asked.target)
        else:
            run(asked)
    except (ConfigError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
