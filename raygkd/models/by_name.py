"""A model of either kind by its name."""

from __future__ import annotations

from torch import nn

from raygkd.errors import ConfigError
from raygkd.models.classifiers import build_classifier
from raygkd.models.detectors import build_detector

# what a detector's name has in it, also where it is misspelled; no classifier's has
MARKS = ("fpn", "rcn", "retina", "fcos", "ssd")


def build_model(name: str, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    """Return a new classifier or detector; the name tells which.

    Args:
        name: as :func:`raygkd.models.build_detector` takes it where it has a mark of detectors
            (``retina``, ``fpn``), else as :func:`raygkd.models.build_classifier` does.
        num_classes: without a background.
        image_size: height and width of the input in pixels; a detector's is square.

    Raises:
        ConfigError: an unknown name, or classes or images the model cannot take.
    """
    if not any(mark in name for mark in MARKS):
        return build_classifier(name, num_classes)
    height, width = image_size
    if height != width:
        raise ConfigError(f"{name} takes square images, got {height} x {width} pixels")
    return build_detector(name, num_classes, height)
