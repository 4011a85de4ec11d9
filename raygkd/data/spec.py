"""Properties of the images that a model needs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """Properties of the images that models need.

    Attributes:
        class_names: names of the classes, in the order of the labels.
        image_size: height and width of the model input in pixels.
        mean, std: statistics per channel, of pixels scaled to 0..1.
        task: "classification" or "detection".
        score: metric by which models are ranked: "accuracy", "map" or "map50".
        augment: kind of the training transform, which also determines how images are resized;
            "auto" if unknown.
    """

    class_names: tuple[str, ...]
    image_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    task: str = "classification"
    score: str = "accuracy"
    augment: str = "auto"
