"""What a model must know of the images."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """What models must know of the images.

    Attributes:
        class_names: the classes, in the order of the labels.
        image_size: height and width of the student's input in pixels.
        mean, std: per channel, of pixels scaled to 0..1.
        task: "classification" or "detection".
        score: what models are ranked by: "accuracy", "map" or "map50".
        augment: kind of the training transform, and with it how an image is brought to the model's
            size; "auto" where it is not known.
        teacher_size: height and width of the teacher's input; None for the student's.
        view_size: height and width of the images that both are given, which each model resizes to
            its own input; None for the student's.
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

    @property
    def view(self) -> tuple[int, int]:
        """Height and width in pixels of the images that teacher and student are given."""
        return self.view_size or self.image_size

    def of_teacher(self) -> ImageSpec:
        """Return what the teacher must know of the images."""
        return dataclasses.replace(self, image_size=self.teacher_size or self.image_size)
