"""Training runs for benchmarks: random weights, random images, always the same batch.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raygkd.assembly.methods import uses_teacher
from raygkd.assembly.models import untrained_file
from raygkd.assembly.training import build_training
from raygkd.config import Config, with_settings
from raygkd.data.boxes import Boxes, ImageBoxes
from raygkd.data.spec import ImageSpec
from raygkd.engine import Training, measure_shares


@dataclass(frozen=True)
class SameBatch:
    """One batch, again and again (the ``Stream`` of the training loop).

    Attributes:
        batch: "image" uint8 (B, 3, H, W) and the arrays of the task's targets.
        steps_per_epoch: how often it comes in an epoch.
        boxes: of a batch for detection.
    """

    batch: Mapping[str, Tensor]
    steps_per_epoch: int = 1
    bad_images: int = 0
    boxes: Boxes | None = None

    def train_batches(self, epoch: int) -> Iterator[Mapping[str, Tensor]]:
        """Yield the batch."""
        return iter([self.batch] * self.steps_per_epoch)

    def eval_batches(self, split: str) -> Iterator[Mapping[str, Tensor]]:
        """Yield the batch once."""
        return iter([self.batch])

    def close(self) -> None:
        """Do nothing: this stream does not prefetch."""


def classes_spec(classes: int, side: int) -> ImageSpec:
    """Return the spec of the images for classification."""
    return ImageSpec(
        class_names=tuple(map(str, range(classes))),
        image_size=(side, side),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )


def random_batch(size: int, spec: ImageSpec) -> dict[str, Tensor]:
    """Return noise and labels."""
    generator = torch.Generator().manual_seed(0)
    shape = (size, 3, *spec.image_size)
    return {
        "image": torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        "label": torch.randint(0, len(spec.class_names), (size,), generator=generator),
    }


def make_training(
    settings: Mapping[str, Any],
    spec: ImageSpec,
    stream: SameBatch,
    device: torch.device,
    *,
    rank: int = 0,
    parallel: Callable[[nn.Module], nn.Module] = lambda module: module,
) -> Training:
    """Return a run that is ready for its first step."""
    config = with_settings(Config(), dict(settings))
    teacher = untrained_file(config.model.teacher, spec) if uses_teacher(config) else None
    training = build_training(
        config,
        spec=spec,
        teacher_file=teacher,
        stream=stream,
        device=device,
        rank=rank,
        parallel=parallel,
    )
    training.objective.train()
    if training.teacher is not None:
        _settle(training, stream.batch)
    measure_shares(training, stream.batch)
    return training


def _settle(training: Training, batch: Mapping[str, Tensor]) -> None:
    """Give the teacher's batch normalisation the statistics of a batch, as training would.

    With the statistics of a new network, maps grow from layer to layer, and all channels of the
    deepest layer have the same pattern; the eigenpairs of such graphs converge unusually fast.
    """
    assert training.teacher is not None
    norms = [part for part in training.teacher.model.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        # a cumulative mean, which the first batch gives alone
        norm.momentum = None
        norm.train()
    images_BCHW, _ = training.to_device(batch)
    training.teacher(training.teacher_normalise(images_BCHW))
    for norm in norms:
        norm.eval()


def random_scenes(size: int, side: int, boxes: int) -> tuple[ImageSpec, SameBatch]:
    """Return noise with boxes, for detectors of three classes.

    Args:
        size: images of the batch.
        side: of the square canvas in pixels.
        boxes: of each image.
    """
    spec = ImageSpec(
        class_names=("a", "b", "c"),
        image_size=(side, side),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        task="detection",
        score="map50",
    )
    random = np.random.default_rng(0)
    corners = random.uniform(0, side / 2, (size, boxes, 2))
    sides = random.uniform(side / 8, side / 2, (size, boxes, 2))
    xyxy = np.concatenate([corners, corners + sides], axis=2).astype(np.float32)
    labels = random.integers(0, 3, (size, boxes))
    nothing = np.zeros(boxes, dtype=bool)
    batch = {
        "image": torch.from_numpy(random.integers(0, 256, (size, 3, side, side), dtype=np.uint8)),
        "boxes": torch.from_numpy(xyxy),
        "classes": torch.from_numpy(labels),
    }
    images = [ImageBoxes(*columns, nothing, nothing) for columns in zip(xyxy, labels, strict=True)]
    return spec, SameBatch(batch, boxes=Boxes.of(images))
