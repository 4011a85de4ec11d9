"""Scenes of handwritten digits with boxes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from raygkd.data.scenes import SCENES, make_scenes, scene_name, write_scenes
from raygkd.data.sets.voc import read_voc_folder
from raygkd.data.sources import DataSet, Sample, Source, SourceOptions, check_classes
from raygkd.registry import DATASETS

DIGITS = tuple("0123456789")


@DATASETS.register("digits-voc")
class DigitScenes(DataSet):
    """Scenes of handwritten digits, with a pair that learns in minutes on a CPU."""

    task = "detection"
    augment = "jitter"
    recipe: ClassVar[Mapping[str, Any]] = {
        "teacher": "fasterrcnn_resnet18_fpn64",
        "student": "fasterrcnn_mobilenet_v3_small_fpn64",
        "epochs": 5,
        "teacher_epochs": 6,
        "lr": 3e-3,
    }

    def open(self, options: SourceOptions) -> Source:
        """Return the scenes with their boxes."""
        return _digits_voc(options)


def _digits_voc(options: SourceOptions) -> Source:
    """Scenes of handwritten digits; with a folder, they are stored there in VOC layout."""
    root = options.data_dir
    if root is not None:
        if not root.exists() or (root.is_dir() and not any(root.iterdir())):
            if options.classes is not None:
                check_classes("digits-voc", DIGITS, options.classes)
            write_scenes(root, images=SCENES)
        return replace(read_voc_folder(replace(options, download=False)), name="digits-voc")
    samples = [
        Sample(
            0,
            split,
            f"digits-voc {scene_name(split, index)}",
            scene.png,
            scene.boxes,
            scene_name(split, index),
        )
        for split, count in SCENES.items()
        for index, scene in enumerate(make_scenes(split, count))
    ]
    return Source("digits-voc", DIGITS, samples)
