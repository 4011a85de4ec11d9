"""What a model must know of the images."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """What models must know of the images.

    Attributes:
        class_names: the classes, in the order of the labels.
        image_size: height and width of the model input in pixels.
        mean, std: per channel, of pixels scaled to 0..1.
        task: "classification" or "detection".
        score: what models are ranked by: "map", "map50" or a registered metric.
        augment: kind of the training transform, and with it how an image is brought to the model's
            size; "auto" where it is not known.
    """

    class_names: tuple[str, ...]
    image_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    task: str = "classification"
    score: str = "accuracy"
    augment: str = "auto"
