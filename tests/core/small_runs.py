"""Small training runs on the CPU, which the tests of the engine share.

Shapes: B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raygkd.assembly.models import untrained_file
from raygkd.assembly.training import build_training
from raygkd.config import Config, with_settings
from raygkd.data import PlainStream, build_transform, open_source, split_rows
from raygkd.data.parquet import ImageTable, open_table
from raygkd.data.prepare import prepare
from raygkd.data.spec import ImageSpec
from raygkd.engine import TeacherStore, Training, run_epoch
from raygkd.engine.loop import Stream
from raygkd.models import ModelFile
from raygkd.models.classifiers import CLASSIFIERS
from raygkd.models.fake_quantised import QuantisedGraph
from raygkd.models.staged import StagedClassifier

torch.set_num_threads(1)

# all terms of the graph losses, in units of the losses
ALL_TERMS = {
    "weights_unit": "loss",
    "graphs": "image",
    "temperature": 5.0,
    "alpha": 100.0,
    "beta": 10.0,
    "gamma": 1.0,
}
CPU = torch.device("cpu")
CLASSES = 10
SPEC = ImageSpec(
    class_names=tuple("0123456789"),
    image_size=(8, 8),
    mean=(0.3,) * 3,
    std=(0.37,) * 3,
    class_counts=tuple(range(20, 30)),
)
BATCH = 64
TIMES = ("epoch_seconds", "images_per_second", "first_step_seconds")


def _layer(in_channels: int, channels: int, *after: nn.Module) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU(), *after)


def tiny(dropout: float, num_classes: int) -> StagedClassifier:
    """Return two stages of one convolution each, the second with dropout."""
    stages = [_layer(3, 8), _layer(8, 12, nn.Dropout(dropout))]
    return StagedClassifier(nn.Identity(), stages, 12, num_classes)


CLASSIFIERS.register("tiny")(partial(tiny, 0.0))
CLASSIFIERS.register("tiny-dropout")(partial(tiny, 0.3))


def prepare_digits(folder: Path) -> ImageTable:
    """Write the digits as shards and open them."""
    prepare(open_source("digits"), str(folder))
    return open_table(str(folder))


def digits_stream(
    table: ImageTable, config: Config, rank: int = 0, world_size: int = 1
) -> PlainStream:
    """Return 256 digits to train on and 129 to validate, as batches of one rank."""
    splits = split_rows(
        table.labels, table.splits, val_fraction=0.09, test_fraction=0.1, limit_train=256, seed=0
    )
    return PlainStream(
        table,
        splits,
        build_transform("crop", 8, train=True),
        build_transform("crop", 8, train=False),
        batch_size=config.optim.batch_size // world_size,
        seed=config.optim.seed,
        rank=rank,
        world_size=world_size,
    )


@dataclass
class TensorStream:
    """The same batches in every epoch and split."""

    batches: Sequence[Mapping[str, Tensor]]
    bad_images: int = 0
    boxes: None = None

    @property
    def steps_per_epoch(self) -> int:
        """Number of the batches."""
        return len(self.batches)

    def train_batches(self, epoch: int) -> Iterator[Mapping[str, Tensor]]:
        """Yield the batches."""
        return iter(self.batches)

    def eval_batches(self, split: str) -> Iterator[Mapping[str, Tensor]]:
        """Yield the batches."""
        return iter(self.batches)

    def close(self) -> None:
        """Nothing reads ahead."""


def random_batch(seed: int = 0, rows: int = BATCH) -> dict[str, Tensor]:
    """Return noise "image" uint8 (B, 3, 8, 8) and "label" (B,)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randint(0, 256, (rows, 3, 8, 8), dtype=torch.uint8, generator=generator),
        "label": torch.randint(0, CLASSES, (rows,), generator=generator),
    }


def random_stream(batches: int = 4) -> TensorStream:
    """Return batches of noise."""
    return TensorStream([random_batch(seed) for seed in range(batches)])


def random_teacher(name: str = "resnet8", seed: int = 100) -> ModelFile:
    """Return a model file of random weights."""
    return untrained_file(name, SPEC, seed)


def make_config(**settings: Any) -> Config:
    """Return the settings of a run of two epochs with all terms, changed as told."""
    return with_settings(Config(), {"method": "graph+kd", "epochs": 2, **ALL_TERMS, **settings})


def make_training(
    images: Stream | ImageTable,
    *,
    teacher: ModelFile | None = None,
    rank: int = 0,
    world_size: int = 1,
    parallel: Callable[[nn.Module], nn.Module] = lambda module: module,
    teacher_store: TeacherStore | None = None,
    graph: QuantisedGraph | None = None,
    **settings: Any,
) -> Training:
    """Return a run of one rank on a stream, or on the digits of a table."""
    config = make_config(**settings)
    stream = (
        digits_stream(images, config, rank, world_size)
        if isinstance(images, ImageTable)
        else images
    )
    return build_training(
        config,
        spec=SPEC,
        teacher_file=None if config.method.method == "none" else teacher or random_teacher(),
        stream=stream,
        device=CPU,
        rank=rank,
        parallel=parallel,
        teacher_store=teacher_store,
        graph=graph,
    )


def curve(training: Training) -> list[dict[str, float]]:
    """Train the epochs that are left; return their metrics without the times."""
    epochs = []
    while training.epoch < training.epochs:
        metrics = run_epoch(training)
        epochs.append({name: metrics[name] for name in metrics if name not in TIMES})
    return epochs


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a model's parameters and buffers."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Return whether two states are equal bit for bit."""
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )
