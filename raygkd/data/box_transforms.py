"""Resizing of images and their boxes to a square canvas, with augmentation by row.

Shapes: C channels (3: red, green, blue), H height, W width, S side of the canvas, M boxes,
4 the sides of a box (x0, y0, x1, y1) in pixels.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from raygkd.data.boxes import ImageBoxes
from raygkd.data.seeds import row_random
from raygkd.errors import ConfigError, near

KINDS = ("none", "jitter", "jitter-flip")

# grey, near the mean of photographs
FILL = 114
SCALES = (0.75, 4 / 3)
# a box of which a crop leaves a smaller part, or fewer pixels, is dropped
LEAST_PART = 0.3
LEAST_SIDE = 2.0
# ranges of torchvision's photometric distortion, each applied half of the time (SSD, 1512.02325)
BRIGHTNESS = (0.875, 1.125)
CONTRAST = (0.5, 1.5)
SATURATION = (0.5, 1.5)
HUE = (-0.05, 0.05)


@dataclass(frozen=True)
class BoxTransform:
    """Places an image and its boxes on a square canvas and, in training, augments both.

    Built by ``build_box_transform``. It has no state: the result depends on the image, its boxes
    and (seed, epoch, row) alone, not on the process or the order.

    Attributes:
        kind: one of ``KINDS``.
        image_size: side of the canvas in pixels.
        train: whether to augment; if not, the image's longer side fills the canvas.
        most: maximum number of boxes in a sample.
    """

    kind: str
    image_size: int
    train: bool
    most: int

    def blank(self) -> dict[str, NDArray]:
        """Return a sample of a black canvas without boxes."""
        size = self.image_size
        nothing = np.zeros((3, size, size), np.uint8), np.empty((0, 4)), np.empty(0)
        return self._arrays(*nothing, ratio=1.0)

    def sample(
        self, image_CHW: Tensor, boxes: ImageBoxes, *, seed: int, epoch: int, row: int
    ) -> dict[str, NDArray]:
        """Return the arrays of one image.

        Args:
            image_CHW: uint8 (3, H, W).
            boxes: boxes of its objects; crowd boxes are dropped, since they mark no single object.
            seed: seed of the run.
            epoch: number of the epoch.
            row: row of the image in its table.

        Returns:
            "image" uint8 (3, S, S); "boxes" float32 (most, 4) in pixels of the canvas and "classes"
            int64 (most,), padded with -1; "ratio", canvas pixels per image pixel.
        """
        draw = row_random(seed, epoch, row) if self.train and self.kind != "none" else None
        image_CHW, xyxy_M4, ratio, placed = self._place(image_CHW, boxes.xyxy, draw)
        if draw is not None:
            image_CHW = _photometric(image_CHW, draw)
            if self.kind == "jitter-flip" and draw.random() < 0.5:
                image_CHW = F.horizontal_flip(image_CHW)
                xyxy_M4[:, [0, 2]] = self.image_size - xyxy_M4[:, [2, 0]]
        keep = placed & ~boxes.crowd
        return self._arrays(image_CHW.numpy(), xyxy_M4[keep], boxes.label[keep], ratio)

    def _arrays(
        self, image_CSS: NDArray, xyxy_M4: NDArray, label_M: NDArray, ratio: float
    ) -> dict[str, NDArray]:
        """Return a sample, with boxes padded to ``most``."""
        boxes = np.zeros((self.most, 4), np.float32)
        classes = np.full(self.most, -1, np.int64)
        boxes[: len(xyxy_M4)], classes[: len(label_M)] = xyxy_M4, label_M
        ratio_array = np.array(ratio, np.float32)
        return {"image": image_CSS, "boxes": boxes, "classes": classes, "ratio": ratio_array}

    def _place(
        self, image_CHW: Tensor, xyxy_M4: NDArray[np.float32], draw: random.Random | None
    ) -> tuple[Tensor, NDArray[np.float32], float, NDArray[np.bool_]]:
        """Return the canvas, the boxes on it, its ratio, and a mask of the visible boxes."""
        size, (full_height, full_width) = self.image_size, image_CHW.shape[1:]
        ratio = size / max(full_height, full_width)
        if draw is not None:
            ratio *= SCALES[0] + (SCALES[1] - SCALES[0]) * draw.random()
        height, width = max(1, round(full_height * ratio)), max(1, round(full_width * ratio))
        if (height, width) != (full_height, full_width):
            image_CHW = F.resize(image_CHW, [height, width], antialias=True)
        top, left = 0, 0
        if draw is not None:
            top, left = _offset(size - height, draw), _offset(size - width, draw)
        canvas_CSS = torch.full((3, size, size), FILL, dtype=torch.uint8)
        canvas_CSS[:, max(0, top) : top + height, max(0, left) : left + width] = image_CHW[
            :, max(0, -top) : size - top, max(0, -left) : size - left
        ]
        moved_M4 = xyxy_M4 * np.float32(ratio) + np.array([left, top, left, top], np.float32)
        clipped_M4 = moved_M4.clip(0, size)
        sides_M2 = clipped_M4[:, 2:] - clipped_M4[:, :2]
        part_M = sides_M2.prod(1) / (moved_M4[:, 2:] - moved_M4[:, :2]).prod(1)
        visible_M = (part_M >= LEAST_PART) & (sides_M2.min(1, initial=np.inf) >= LEAST_SIDE)
        return canvas_CSS, clipped_M4, ratio, visible_M


def build_box_transform(kind: str, image_size: int, *, train: bool, most: int) -> BoxTransform:
    """Return the transform of one kind.

    - "none": the image's longer side is resized to the canvas; all kinds do this in evaluation.
    - "jitter": the same, scaled by 0.75 to 1.33 and placed at random, with random brightness,
      contrast, saturation and hue.
    - "jitter-flip": "jitter", then mirrored half of the time.

    Raises:
        ConfigError: the kind is unknown.
    """
    if kind not in KINDS:
        kinds = ", ".join(KINDS)
        raise ConfigError(
            f"--augment {kind!r}: for object detection it must be one of {kinds}{near(kind, KINDS)}"
        )
    return BoxTransform(kind, image_size, train, max(1, most))


def _offset(room: int, draw: random.Random) -> int:
    """Return a random offset of an image within the free space, or of a crop if it is larger."""
    return int(draw.random() * (abs(room) + 1)) * (1 if room >= 0 else -1)


def _photometric(image_CHW: Tensor, draw: random.Random) -> Tensor:
    changes = (
        (F.adjust_brightness, BRIGHTNESS),
        (F.adjust_contrast, CONTRAST),
        (F.adjust_saturation, SATURATION),
        (F.adjust_hue, HUE),
    )
    for change, (low, high) in changes:
        if draw.random() < 0.5:
            image_CHW = change(image_CHW, low + (high - low) * draw.random())
    return image_CHW
