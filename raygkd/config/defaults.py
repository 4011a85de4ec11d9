"""Defaults that depend on the data set or on the models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# of raygkd.models.detectors, which needs torch
DETECTOR_NAME = re.compile(r"[a-z]+_.+_fpn\d*")
# what suits detectors where nothing else is given
_DETECTOR = {
    "optimizer": "adamw",
    "batch_size": 8,
    "warmup_epochs": 0.5,
    "clip_norm": 10.0,
    # a pyramid's maps have no ReLU, most of a channel is the same everywhere, and most positions
    # are background
    "adapter": "plain",
    "centre": True,
    "foreground": 0.5,
}
_PHOTOGRAPHS = {
    "teacher": "fasterrcnn_resnet50_fpn",
    "student": "fasterrcnn_resnet18_fpn",
    "teacher_epochs": 20,
    "lr": 1e-4,
}
DATASET_DEFAULTS: dict[str, dict[str, Any]] = {
    # a pair that learns in minutes on a CPU
    "digits-voc": {
        **_DETECTOR,
        "teacher": "fasterrcnn_resnet18_fpn64",
        "student": "fasterrcnn_mobilenet_v3_small_fpn64",
        "epochs": 5,
        "teacher_epochs": 6,
        "lr": 3e-3,
    },
    "voc": {**_DETECTOR, **_PHOTOGRAPHS},
    "coco": {**_DETECTOR, **_PHOTOGRAPHS},
}


def dependent_defaults(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the defaults that hang on the data set, or where it is of any task on the models.

    Values that are no names are left to the checks that follow.
    """
    dataset, *models = (
        str(leaves.get(name)) if isinstance(leaves := tree.get(section), Mapping) else ""
        for section, name in (("data", "dataset"), ("model", "student"), ("model", "teacher"))
    )
    if dataset in DATASET_DEFAULTS:
        return DATASET_DEFAULTS[dataset]
    is_detection = any(map(DETECTOR_NAME.fullmatch, models))
    return {**_DETECTOR, "lr": _PHOTOGRAPHS["lr"]} if is_detection else {}
