"""Defaults that depend on the data set, on the models, or on the recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from raygkd.config.recipe import RECIPES
from raygkd.registry import DATASETS, FAMILIES, entry_name, entry_points

# of raygkd.models.detectors, which needs torch
DETECTOR_NAME = re.compile(r"[a-z]+_.+_fpn\d*")
# defaults for detectors
_DETECTOR = {
    "optimizer": "adamw",
    "batch_size": 8,
    "warmup_epochs": 0.5,
    "clip_norm": 10.0,
    "lr": 1e-4,
    # the maps of a pyramid have no ReLU, their channels have large means, and most positions are
    # background
    "adapter": "plain",
    "centre": True,
    "fade": "none",
    "foreground": 0.5,
}


def dataset_defaults(dataset: str) -> Mapping[str, Any]:
    """Return the defaults on a data set that differ from those of the settings."""
    if entry_name(dataset) not in DATASETS.names():
        return {}
    cls = DATASETS.get(entry_name(dataset))
    return {**(_DETECTOR if cls.task == "detection" else {}), **cls.recipe}


def names_detector(model: str) -> bool:
    """Return whether a name is that of a detector."""
    prefix, colon, _ = model.partition(":")
    if colon:
        return prefix in FAMILIES.names() and FAMILIES.get(prefix).task == "detection"
    is_of_others = model in entry_points("raygkd.classifiers")
    return not is_of_others and DETECTOR_NAME.fullmatch(model) is not None


def dependent_defaults(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the defaults of the recipe, of the data set, or of the models if its task is open.

    Those of the recipe come first. Values that are not names are left to later checks.
    """
    dataset, student, teacher, recipe = (
        str(leaves.get(name)) if isinstance(leaves := tree.get(section), Mapping) else ""
        for section, name in (
            ("data", "dataset"),
            ("model", "student"),
            ("model", "teacher"),
            ("recipe", "recipe"),
        )
    )
    defaults = dataset_defaults(dataset)
    if not defaults and any(map(names_detector, (student, teacher))):
        defaults = _DETECTOR
    return {**defaults, **RECIPES.get(recipe, {})}
