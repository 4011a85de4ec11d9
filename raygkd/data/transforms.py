"""Resizing of images, with augmentation that depends on the row alone.

Shapes: C channels (3: red, green, blue), H height, W width, S side of the square model input.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from raygkd.data.seeds import row_random
from raygkd.data.views import UNCHANGED, Views
from raygkd.errors import ConfigError, near

KINDS = ("none", "crop", "crop-flip", "resized-crop")

CROP_AREA = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
CROP_TRIES = 10
EVAL_ENLARGEMENT = 256 / 224


@dataclass(frozen=True)
class Transform:
    """Resizes an image to the model's input and, in training, augments it.

    Built by ``build_transform``. It has no state: the result depends on the image and on (seed,
    epoch, row) alone, not on the process or the order.

    Attributes:
        kind: one of ``KINDS``.
        image_size: side of the result in pixels.
        train: whether to augment; if not, the result depends on the image alone.
        views: changes after the crop, in training.
    """

    kind: str
    image_size: int
    train: bool
    views: Views = UNCHANGED

    def __call__(self, image_CHW: Tensor, *, seed: int, epoch: int, row: int) -> Tensor:
        """Return uint8 (3, S, S) for uint8 (3, H, W)."""
        if not self.train:
            resize = _centre_crop if self.kind == "resized-crop" else _fit
            return resize(image_CHW, self.image_size)
        draw = row_random(seed, epoch, row)
        return self.views(self._augmented(image_CHW, draw), draw)

    def _augmented(self, image_CHW: Tensor, draw: random.Random) -> Tensor:
        if self.kind == "resized-crop":
            return _flip(_resized_crop(image_CHW, self.image_size, draw), draw)
        image_CSS = _fit(image_CHW, self.image_size)
        if self.kind in ("crop", "crop-flip"):
            image_CSS = _padded_crop(image_CSS, draw)
        return _flip(image_CSS, draw) if self.kind == "crop-flip" else image_CSS

    def blank(self) -> dict[str, NDArray]:
        """Return a sample of a black image without a label."""
        size = self.image_size
        return {"image": np.zeros((3, size, size), np.uint8), "label": np.array(-1)}

    def sample(
        self, image_CHW: Tensor, label: int, *, seed: int, epoch: int, row: int
    ) -> dict[str, NDArray]:
        """Return the arrays of one image: "image" uint8 (3, S, S) and "label" int64."""
        image_CSS = self(image_CHW, seed=seed, epoch=epoch, row=row)
        return {"image": image_CSS.numpy(), "label": np.array(label)}


def build_transform(
    kind: str, image_size: int, *, train: bool, views: Views = UNCHANGED
) -> Transform:
    """Return the transform of one kind.

    - "none": resize to the square if needed; "crop" and "crop-flip" do the same in evaluation.
    - "crop": random shift by up to an eighth of the side; edges are filled with black.
    - "crop-flip": "crop", then mirrored half of the time: the usual recipe for CIFAR.
    - "resized-crop": a crop of random area (8-100%) and aspect ratio (3:4-4:3), resized to the
      square and mirrored half of the time (arXiv 1409.4842); in evaluation, a centre crop of 7/8 of
      the side.

    In training, ``views`` follow.

    Raises:
        ConfigError: the kind is unknown.
    """
    if kind not in KINDS:
        kinds = ", ".join(KINDS)
        raise ConfigError(f"--augment {kind!r}: must be one of {kinds}{near(kind, KINDS)}")
    return Transform(kind, image_size, train, views)


def default_augment(uniform_size: bool) -> str:
    """Return the default kind for labelled images that may be mirrored, such as photographs.

    Args:
        uniform_size: whether all images have the same size.
    """
    return "crop-flip" if uniform_size else "resized-crop"


def _fit(image_CHW: Tensor, size: int) -> Tensor:
    if image_CHW.shape[1:] == (size, size):
        return image_CHW
    return F.resize(image_CHW, [size, size], antialias=True)


def _centre_crop(image_CHW: Tensor, size: int) -> Tensor:
    shorter = round(size * EVAL_ENLARGEMENT)
    return F.center_crop(F.resize(image_CHW, [shorter], antialias=True), [size, size])


def _padded_crop(image_CSS: Tensor, draw: random.Random) -> Tensor:
    size = image_CSS.shape[-1]
    padding = max(1, size // 8)
    top, left = (_below(2 * padding + 1, draw) - padding for _ in range(2))
    # outside the image a crop is black
    return F.crop(image_CSS, top, left, size, size)


def _resized_crop(image_CHW: Tensor, size: int, draw: random.Random) -> Tensor:
    full_height, full_width = image_CHW.shape[1:]
    height = width = min(full_height, full_width)
    log_ratio = math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])
    for _ in range(CROP_TRIES):
        area = full_height * full_width * _between(*CROP_AREA, draw)
        ratio = math.exp(_between(*log_ratio, draw))
        crop = max(1, round(math.sqrt(area / ratio))), max(1, round(math.sqrt(area * ratio)))
        if crop[0] <= full_height and crop[1] <= full_width:
            height, width = crop
            break
    top = _below(full_height - height + 1, draw)
    left = _below(full_width - width + 1, draw)
    return F.resized_crop(image_CHW, top, left, height, width, [size, size], antialias=True)


def _flip(image_CHW: Tensor, draw: random.Random) -> Tensor:
    return F.horizontal_flip(image_CHW) if draw.random() < 0.5 else image_CHW


def _below(limit: int, draw: random.Random) -> int:
    return int(draw.random() * limit)


def _between(low: float, high: float, draw: random.Random) -> float:
    return low + (high - low) * draw.random()
