"""Cluttered digits: a classification problem that needs no download and rewards larger models.

A greyscale image of 32 x 32 pixels shows one whole handwritten digit at a random position, size and
angle, surrounded by pieces of other digits. The digits are those of ``load_digits``; no digit
appears in two splits. The images must never change: a different generator would be a different data
set.

Shapes: N digits, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raygkd.data.scenes import digits_of_split
from raygkd.data.seeds import generator
from raygkd.data.sklearn_digits import Digits, load_digits
from raygkd.data.sources import DataSet, Sample, Source, SourceOptions, encode_png
from raygkd.data.splits import SPLITS
from raygkd.registry import DATASETS

IMAGES = {"train": 3000, "val": 500, "test": 2000}
"""Images of each split of the data set cluttered-digits."""

CANVAS = 32
# range of the sides of whole digits, in pixels; pieces are cut from digits of the same sizes
SIDES = (14, 24)
# maximum rotation of a digit in either direction, in degrees
MAX_ANGLE = 30.0
# number of pieces of other digits in an image, and their sides in pixels
PIECES, PIECE_SIDES = (4, 8), (5, 9)
# ranges of brightness, from 0 to 255
BACKGROUND, INK = (0, 60), (140, 255)
NOISE = (4, 16)
# makes the random numbers differ from those of other data sets of digits
KEY = 32


@DATASETS.register("cluttered-digits")
class ClutteredDigits(DataSet):
    """A handwritten digit among pieces of other digits; images must not be mirrored."""

    task = "classification"
    reads_folder = False
    augment = "crop"

    def open(self, options: SourceOptions) -> Source:
        """Return the images, which are drawn when they are read."""
        digits = load_digits()
        samples = []
        for split, count in IMAGES.items():
            chosen = digits_of_split(digits, split)
            for index in range(count):
                image = ClutteredImage(digits, chosen, (KEY, SPLITS.index(split), index))
                origin = f"cluttered-digits {split} {index}"
                samples.append(Sample(image.label, split, origin, image.png))
        return Source("cluttered-digits", tuple("0123456789"), samples)


@dataclass(frozen=True, eq=False)
class ClutteredImage:
    """An image that is drawn on request.

    Attributes:
        digits: the handwritten digits.
        chosen: indices of the digits that may be used (N,).
        key: key of its random numbers.
    """

    digits: Digits
    chosen: NDArray[np.int64]
    key: tuple[int, ...]

    @property
    def label(self) -> int:
        """The label of the whole digit."""
        return int(self.digits.label[self._whole_digit(generator(*self.key))])

    def _whole_digit(self, rng: np.random.Generator) -> int:
        """Return the index of the whole digit, which is the first random choice."""
        return int(rng.choice(self.chosen))

    def paint(self) -> NDArray[np.uint8]:
        """Return the pixels (H, W): pieces, the whole digit on top of them, and noise."""
        rng = generator(*self.key)
        digit = self._whole_digit(rng)
        canvas_HW = np.full((CANVAS, CANVAS), rng.uniform(*BACKGROUND))
        for _ in range(rng.integers(*PIECES, endpoint=True)):
            ink_HW = _rotated(self.digits.images_BHW[int(rng.choice(self.chosen))], rng)
            side = int(rng.integers(*PIECE_SIDES, endpoint=True))
            top, left = (int(rng.integers(max(1, length - side))) for length in ink_HW.shape)
            _draw(canvas_HW, ink_HW[top : top + side, left : left + side], rng)
        _draw(canvas_HW, _rotated(self.digits.images_BHW[digit], rng), rng)
        canvas_HW += rng.uniform(*NOISE) * rng.normal(size=canvas_HW.shape)
        return np.rint(canvas_HW.clip(0, 255)).astype(np.uint8)

    def png(self) -> bytes:
        """Return the image as a PNG."""
        return encode_png(self.paint())


def _rotated(image_HW: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.float64]:
    """Return the ink of a digit, randomly enlarged and rotated, as opacity from 0 to 1."""
    side = int(rng.integers(*SIDES, endpoint=True))
    enlarged = Image.fromarray(image_HW).resize((side, side), Image.Resampling.BICUBIC)
    rotated = enlarged.rotate(rng.uniform(-MAX_ANGLE, MAX_ANGLE), Image.Resampling.BICUBIC)
    return np.asarray(rotated) / 255


def _draw(
    canvas_HW: NDArray[np.float64], ink_HW: NDArray[np.float64], rng: np.random.Generator
) -> None:
    """Draw ink on a canvas, at a random position inside it."""
    height, width = ink_HW.shape
    top, left = (int(rng.integers(CANVAS - length, endpoint=True)) for length in (height, width))
    under_HW = canvas_HW[top : top + height, left : left + width]
    under_HW += ink_HW * (rng.uniform(*INK) - under_HW)
