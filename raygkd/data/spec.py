"""Properties of the images that a model needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """Properties of the images that models need.

    Attributes:
        class_names: names of the classes, in the order of the labels.
        image_size: height and width of the student's input in pixels.
        mean, std: statistics per channel, of pixels scaled to 0..1.
        task: "classification" or "detection".
        score: metric by which models are ranked: "map", "map50" or a registered metric.
        augment: kind of the training transform, which also determines how images are resized;
            "auto" if unknown.
        teacher_size: height and width of the teacher's input; None if it is the student's.
        view_size: height and width of the images that both models get and resize to their own
            input; None if it is the student's.
        class_counts: number of training images of each class; empty if unknown.
        unlabelled: number of training images without labels.
    """

    class_names: tuple[str, ...]
    image_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    task: str = "classification"
    score: str = "accuracy"
    augment: str = "auto"
    teacher_size: tuple[int, int] | None = None
    view_size: tuple[int, int] | None = None
    class_counts: tuple[int, ...] = ()
    unlabelled: int = 0

    @property
    def has_labels(self) -> bool:
        """Whether there are images with labels, or with boxes."""
        return self.unlabelled == 0 or any(self.class_counts)

    @property
    def view(self) -> tuple[int, int]:
        """Height and width in pixels of the images that teacher and student are given."""
        return self.view_size or self.image_size

    def of_trial(self, params: Mapping[str, Any]) -> ImageSpec:
        """Return the spec for a trial's model.

        Images and teacher stay as they are: a student of another input size resizes the same
        images, as it does when it is deployed.

        Args:
            params: the trial's settings; "image_size", in pixels, and "augment" count.
        """
        side = params.get("image_size")
        if side is None and "augment" not in params:
            return self
        return dataclasses.replace(
            self,
            image_size=self.image_size if side is None else (side, side),
            teacher_size=self.of_teacher().image_size,
            view_size=self.view,
            augment=params.get("augment", self.augment),
        )

    def of_teacher(self) -> ImageSpec:
        """Return what the teacher must know of the images."""
        return dataclasses.replace(self, image_size=self.teacher_size or self.image_size)
