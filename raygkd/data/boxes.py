"""Boxes around the objects of images.

Shapes: M boxes of one image or of all, 4 the sides of a box (x0, y0, x1, y1): pixels of the upright
original image, x to the right and y down, so that the image is [0, width] x [0, height].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class ImageBoxes:
    """The objects of one image.

    Attributes:
        xyxy: sides of each box in pixels, float32 (M, 4).
        label: position in the class names, int64 (M,).
        difficult: hard to recognise (Pascal VOC), bool (M,).
        crowd: one box around many objects (COCO), bool (M,).
    """

    xyxy: NDArray[np.float32]
    label: NDArray[np.int64]
    difficult: NDArray[np.bool_]
    crowd: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.label)

    def keep(self, chosen: NDArray[np.bool_]) -> ImageBoxes:
        """Return the boxes that are chosen, a bool of each (M,)."""
        return ImageBoxes(*(getattr(self, field.name)[chosen] for field in fields(self)))


@dataclass(frozen=True, eq=False)
class Boxes:
    """The objects of many images, one image after the other.

    Attributes:
        first: place of each image's first box, and the number of all boxes, int64 (images + 1,).
        every: the boxes of all images.
    """

    first: NDArray[np.int64]
    every: ImageBoxes

    @classmethod
    def of(cls, images: Sequence[ImageBoxes]) -> Boxes:
        """Return the boxes of images, in order; at least one image."""
        counts = [len(boxes) for boxes in images]
        columns = (
            np.concatenate([getattr(boxes, field.name) for boxes in images])
            for field in fields(ImageBoxes)
        )
        return cls(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), ImageBoxes(*columns))

    def __len__(self) -> int:
        return len(self.first) - 1

    def __getitem__(self, image: int) -> ImageBoxes:
        """Return the boxes of one image, counted from 0."""
        part = slice(self.first[image], self.first[image + 1])
        return ImageBoxes(*(getattr(self.every, field.name)[part] for field in fields(self.every)))

    @property
    def most(self) -> int:
        """The number of boxes of the image that has the most."""
        return int(np.diff(self.first).max(initial=0))
