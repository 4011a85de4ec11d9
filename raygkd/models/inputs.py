"""What a model expects of its input images."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelInput:
    """How images are brought to a model.

    Attributes:
        size: height and width in pixels; None where the data or ``--image-size`` says.
        mean, std: what a pixel in 0..1 is normalised with, by channel; None for the statistics of
            the training images.
        interpolation: how images are resized to ``size``: "bilinear" or "bicubic".
    """

    size: tuple[int, int] | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    interpolation: str = "bilinear"
