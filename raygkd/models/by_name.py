"""A model of either kind by its name."""

from __future__ import annotations

import difflib

from torch import nn

from raygkd.errors import ConfigError
from raygkd.models.classifiers import (
    build_classifier,
    check_classifier_name,
    classifier_names,
    is_classifier,
)
from raygkd.models.detectors import build_detector, detector_names, is_detector
from raygkd.models.families import build_of_family, check_family_name, family_of

SMALLEST_DETECTOR_IMAGE = 32


def build_model(name: str, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    """Return a new classifier or detector; the name tells which.

    Args:
        name: as :func:`raygkd.models.build_detector` or :func:`raygkd.models.build_classifier`
            takes it, or FAMILY:NAME. An unknown name is taken for what the nearest known one is.
        num_classes: without a background.
        image_size: height and width of the input in pixels; a detector's is square.

    Raises:
        ConfigError: an unknown name, or classes or images the model cannot take.
    """
    family = family_of(name)
    if not _means_detector(name):
        return build_classifier(name, num_classes, image_size)
    height, width = image_size
    if height != width:
        raise ConfigError(f"{name} takes square images, got {height} x {width} pixels")
    if family is not None and family.task == "detection":
        return build_of_family(family, name, num_classes, image_size)
    return build_detector(name, num_classes, height)


def check_model_name(name: str, *, trains: bool = False) -> None:
    """Refuse an unknown name of a classifier or a family; no model is built.

    Args:
        name: as ``build_model`` takes it.
        trains: whether the model is to be trained, for messages.

    Raises:
        ConfigError: names the nearest ones.
    """
    family = family_of(name)
    if not _means_detector(name):
        check_classifier_name(name, trains=trains)
    elif family is not None and family.task == "detection":
        check_family_name(family, name)
    else:
        build_detector(name, 1, SMALLEST_DETECTOR_IMAGE)


def _means_detector(name: str) -> bool:
    """Return whether a name is that of a detector, or unknown and nearest to one."""
    family = family_of(name)
    if family is not None:
        # a detector behind the prefix of classifiers is told its own name
        return family.task == "detection" or is_detector(name.partition(":")[2])
    if is_classifier(name) or is_detector(name):
        return is_detector(name)
    if ":" in name:
        return False
    nearest = difflib.get_close_matches(name, [*classifier_names(), *detector_names()], n=1)
    return bool(nearest) and nearest[0] in detector_names()
