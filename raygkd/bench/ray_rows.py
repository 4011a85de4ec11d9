"""The cost of Ray: start-up, DDP and the stream of images, compared with plain torch.

Shapes: C channels, H height, W width.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from raygkd.assembly.models import new_model
from raygkd.bench import ddp
from raygkd.bench.rows import Row, Rows
from raygkd.bench.runs import SameBatch, classes_spec, make_training, random_batch
from raygkd.config import DataConfig
from raygkd.data.decoding import decode
from raygkd.data.run_images import open_images
from raygkd.data.spec import ImageSpec
from raygkd.data.windows import Sampler
from raygkd.engine import training_step
from raygkd.rayrun.image_stream import RayStream, share
from raygkd.rayrun.measuring import on_workers, seconds_to_nested_step
from raygkd.storage.atomic_files import place

# sides of the photographs and of the model input, in pixels
PHOTOGRAPH, INPUT = 256, 224
BATCH = 32
# number of processes on either side
PROCESSES = 2
CLASSES = ("china", "flower")


def nested_seconds(folder: Path) -> float:
    """Return the seconds that a trial takes to its first step through a trainer of its own."""
    return seconds_to_nested_step(first_step, folder)


def first_step() -> None:
    """Build a run of digits' size and train one step."""
    spec = classes_spec(10, 8)
    stream = SameBatch(random_batch(64, spec))
    settings = {"teacher": "resnet20", "student": "resnet8", "method": "graph"}
    training_step(make_training(settings, spec, stream, torch.device("cpu")), stream.batch)


def ddp_rows(folder: Path, *, quick: bool) -> Rows:
    """Yield the seconds of an epoch of two workers through Ray Train and under torchrun."""
    steps, epochs, turns = (15, 3, 1) if quick else (40, 6, 3)
    seconds: dict[str, list[float]] = {"ray": [], "torchrun": []}
    for turn in range(turns):
        function = functools.partial(ddp.seconds_of_epochs, steps, epochs)
        run = folder / f"ddp-{turn}"
        run.mkdir()
        seconds["ray"] += on_workers(function, run, workers=ddp.RANKS)
        seconds["torchrun"] += ddp.under_torchrun(steps, epochs)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    yield Row(
        what=f"epoch of {steps} steps, DDP of {ddp.RANKS} workers through Ray Train",
        against="torchrun",
        value=medians["ray"] / medians["torchrun"],
        unit="x",
        bound=1.03,
        configuration={**ddp.SETTINGS, "side": ddp.SIDE, "seconds": seconds},
    )


def stream_rows(folder: Path, *, quick: bool) -> Rows:
    """Yield the rate of Ray Data relative to a DataLoader's, and how long training waits for it."""
    count, epochs = (1600, 3) if quick else (3200, 6)
    photographs = write_photographs(folder / "photographs", count)
    data = DataConfig(
        dataset="imagefolder",
        data_dir=str(photographs),
        image_size=INPUT,
        augment="resized-crop",
        val_fraction=0.05,
        test_fraction=0.05,
    )
    images = open_images(data, seed=0, output=place(str(folder)))
    shared = share(images, cache_mb=0)
    stream = functools.partial(RayStream, shared, batch_size=BATCH, seed=0, rank=0, world_size=1)
    files = sorted(photographs.rglob("*.jpg"))
    rates: dict[str, list[float]] = {"ray": [], "loader": []}
    for _ in range(1 if quick else 3):
        with contextlib.closing(stream(epochs=range(epochs))) as passes:
            rates["ray"].append(_images_per_second(_training_batches(passes, epochs), count))
        loader = DataLoader(
            Photographs(files * epochs, images.transform("train")),
            batch_size=BATCH,
            num_workers=PROCESSES,
            shuffle=True,
        )
        rates["loader"].append(_images_per_second(iter(loader), count))
    yield Row(
        what=f"stream of {PHOTOGRAPH} x {PHOTOGRAPH} JPEG photographs, Ray Data",
        against=f"DataLoader, {PROCESSES} processes",
        value=statistics.median(rates["ray"]) / statistics.median(rates["loader"]),
        unit="x",
        bound=1.0,
        at_least=True,
        configuration={"images": count, "epochs": epochs, "images per second": rates},
    )
    steps = 4 if quick else 40
    with contextlib.closing(stream(epochs=range(1))) as passes:
        batches = _training_batches(passes, 1)
        share_waited = _waiting(batches, images.spec, steps)
        # shutting Ray down while Ray Data reads would end the process
        for _ in batches:
            pass
    yield Row(
        what="waiting for Ray Data in a step of ResNet-18",
        against="",
        value=100 * share_waited,
        unit="%",
        bound=5.0,
        configuration={"batch": BATCH, "side": INPUT, "steps": steps},
    )


def write_photographs(folder: Path, count: int) -> Path:
    """Write crops of scikit-learn's two photographs as JPEG files, in one folder for each."""
    random = torch.Generator().manual_seed(0)
    for name, picture in zip(CLASSES, load_sample_images().images, strict=True):
        (folder / name).mkdir(parents=True)
        height, width, _ = picture.shape
        for number in range(count // len(CLASSES)):
            y = int(torch.randint(height - PHOTOGRAPH, (), generator=random))
            x = int(torch.randint(width - PHOTOGRAPH, (), generator=random))
            cutting = picture[y : y + PHOTOGRAPH, x : x + PHOTOGRAPH]
            Image.fromarray(cutting).save(folder / name / f"{number:05d}.jpg", quality=90)
    return folder


class Photographs(Dataset):
    """The same images, transformed in the same way, for a DataLoader."""

    def __init__(self, files: list[Path], transform: Sampler):
        self._files, self._transform = files, transform

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the arrays of one image."""
        path = self._files[index]
        image_CHW = decode(path.read_bytes())
        label = CLASSES.index(path.parent.name)
        return self._transform.sample(image_CHW, label, seed=0, epoch=0, row=index)


def _training_batches(stream: RayStream, epochs: int) -> Iterator[Mapping[str, Tensor]]:
    """Yield the training batches of epochs, as a run reads them: validation in between."""
    for epoch in range(epochs):
        yield from stream.train_batches(epoch)
        for _ in stream.eval_batches("val"):
            pass


def _images_per_second(batches: Iterator[Mapping[str, Tensor]], skipped: int) -> float:
    """Return the rate of images after the first ones.

    By then, both sides have started their processes and delivered the prefetched batches; no more
    are prefetched, because the images are not used.

    Args:
        batches: all batches.
        skipped: minimum number of images before the measurement starts.
    """
    while skipped > 0:
        skipped -= len(next(batches)["image"])
    started = time.perf_counter()
    images = sum(len(batch["image"]) for batch in batches)
    return images / (time.perf_counter() - started)


def _waiting(batches: Iterator[Mapping[str, Tensor]], spec: ImageSpec, steps: int) -> float:
    """Return the share of the time that a student's training waits for its next batch."""
    model = new_model("torchvision:resnet18", spec)
    waited = 0.0
    batch = next(batches)
    started = time.perf_counter()
    for _ in range(steps):
        logits_BK = model(batch["image"].float() / 255)
        torch.nn.functional.cross_entropy(logits_BK, batch["label"]).backward()
        requested = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - requested
    return waited / (time.perf_counter() - started)
