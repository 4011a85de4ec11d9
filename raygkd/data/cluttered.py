"""Cluttered digits: a classification problem without a download on which a larger model pays.

An image of 32 x 32 grey pixels has one whole handwritten digit at a random place, size and angle,
and around it pieces of other digits. The digits are those of ``load_digits``; no digit is in the
images of two splits. The images never change: another generator would be another data set.

Shapes: N digits, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raygkd.data.scenes import digits_of_split
from raygkd.data.seeds import generator
from raygkd.data.sources import (
    DataSet,
    Digits,
    Sample,
    Source,
    SourceOptions,
    encode_png,
    load_digits,
)
from raygkd.data.splits import SPLITS
from raygkd.registry import DATASETS

IMAGES = {"train": 3000, "val": 500, "test": 2000}
"""Images of each split of the data set cluttered-digits."""

CANVAS = 32
# sides of the whole digit and of the digits that pieces are cut from, in pixels
SIDES = (14, 24)
# most turn of a digit in either direction, in degrees
TURN = 30.0
# pieces of other digits in an image, and their sides in pixels
PIECES, PIECE_SIDES = (4, 8), (5, 9)
# brightness, of 255
GROUND, INK = (0, 60), (140, 255)
NOISE = (4, 16)
# keeps these random numbers apart from those of other data sets of digits
KEY = 32


@DATASETS.register("cluttered-digits")
class ClutteredDigits(DataSet):
    """A real digit among pieces of others in each image; they must not be mirrored."""

    task = "classification"
    augment = "crop"

    def open(self, options: SourceOptions) -> Source:
        """Return the images, which are painted when they are read."""
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
    """An image that is not painted yet.

    Attributes:
        digits: what it is made of.
        chosen: numbers of the digits that may be taken (N,).
        key: of its random numbers.
    """

    digits: Digits
    chosen: NDArray[np.int64]
    key: tuple[int, ...]

    @property
    def label(self) -> int:
        """The whole digit."""
        return int(self.digits.label[self._whole(generator(*self.key))])

    def _whole(self, rng: np.random.Generator) -> int:
        """Return the number of the whole digit: the first that is drawn."""
        return int(rng.choice(self.chosen))

    def paint(self) -> NDArray[np.uint8]:
        """Return the pixels (H, W): pieces first, the whole digit over them, noise over all."""
        rng = generator(*self.key)
        whole = self._whole(rng)
        canvas_HW = np.full((CANVAS, CANVAS), rng.uniform(*GROUND))
        for _ in range(rng.integers(*PIECES, endpoint=True)):
            ink_HW = _turned(self.digits.images_BHW[int(rng.choice(self.chosen))], rng)
            side = int(rng.integers(*PIECE_SIDES, endpoint=True))
            top, left = (int(rng.integers(max(1, length - side))) for length in ink_HW.shape)
            _draw(canvas_HW, ink_HW[top : top + side, left : left + side], rng)
        _draw(canvas_HW, _turned(self.digits.images_BHW[whole], rng), rng)
        canvas_HW += rng.uniform(*NOISE) * rng.normal(size=canvas_HW.shape)
        return np.rint(canvas_HW.clip(0, 255)).astype(np.uint8)

    def png(self) -> bytes:
        """Return the painted image as a PNG."""
        return encode_png(self.paint())


def _turned(image_HW: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.float64]:
    """Return the ink of a digit, enlarged to a random side and turned, as opacity from 0 to 1."""
    side = int(rng.integers(*SIDES, endpoint=True))
    enlarged = Image.fromarray(image_HW).resize((side, side), Image.Resampling.BICUBIC)
    turned = enlarged.rotate(rng.uniform(-TURN, TURN), Image.Resampling.BICUBIC)
    return np.asarray(turned) / 255


def _draw(
    canvas_HW: NDArray[np.float64], ink_HW: NDArray[np.float64], rng: np.random.Generator
) -> None:
    """Paint ink over a canvas, at a random place inside it."""
    height, width = ink_HW.shape
    top, left = (int(rng.integers(CANVAS - length, endpoint=True)) for length in (height, width))
    under_HW = canvas_HW[top : top + height, left : left + width]
    under_HW += ink_HW * (rng.uniform(*INK) - under_HW)
