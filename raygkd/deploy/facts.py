"""The properties of a model that its users need, and its predictions.

Shapes: H height, W width, S side of the square input, T predictions of an image, 4 the sides of a
box (x0, y0, x1, y1) in pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from raygkd.config import recorded_settings
from raygkd.data.box_transforms import build_box_transform
from raygkd.data.boxes import ImageBoxes
from raygkd.data.transforms import build_transform
from raygkd.errors import ConfigError, DataError, brief
from raygkd.models import ModelFile, is_detector, short_name
from raygkd.models.files import LARGEST_SIDE
from raygkd.storage.atomic_files import Place
from raygkd.storage.reading import check_type, parse_json
from raygkd.version import __version__

# how an image of any size becomes a square: stretched, centre-cropped, or padded with grey
STRETCH, CENTRE, CANVAS = "stretch", "centre-crop", "canvas"
# key of all facts in the metadata of an exported file
METADATA = "raygkd"
# the types of the facts in it
SHAPE = {
    "model": str,
    "task": str,
    "class_names": list[str],
    "image_size": int,
    "resize": str,
}
NO_BOXES = ImageBoxes(
    np.empty((0, 4), np.float32), np.empty(0, np.int64), np.empty(0, bool), np.empty(0, bool)
)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Properties of a model that its users need, stored in the metadata of exported files.

    Attributes:
        model: name of the model.
        task: "classification" or "detection".
        class_names: names of the classes, in the order of the logits or of a detector's labels.
        image_size: S in pixels.
        resize: how images are resized to S, "stretch", "centre-crop" or "canvas".
    """

    model: str
    task: str
    class_names: tuple[str, ...]
    image_size: int
    resize: str

    def to_metadata(self) -> dict[str, str]:
        """Return the facts as metadata of an exported file."""
        return {METADATA: json.dumps({"version": __version__, **asdict(self)})}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], path: Place) -> Facts:
        """Return the facts in the metadata of an exported file.

        Raises:
            DataError: there are none.
        """
        try:
            facts = parse_json(metadata[METADATA])
            check_type(facts, SHAPE)
            facts = {name: facts[name] for name in cls.__dataclass_fields__}
            _check_values(facts)
        except KeyError as error:
            raise DataError(
                f"{path} was not written by 'raygkd export': export it again"
            ) from error
        except ValueError as error:
            raise DataError(f"{path} has damaged metadata ({error}): export it again") from error
        return cls(**{**facts, "class_names": tuple(facts["class_names"])})

    def prepare(self, image_CHW: Tensor) -> tuple[NDArray[np.uint8], float]:
        """Resize an image uint8 (3, H, W) to uint8 (3, S, S); return it and the scale of boxes."""
        size = self.image_size
        if self.resize == CANVAS:
            sample = build_box_transform("none", size, train=False, most=1).sample(
                image_CHW, NO_BOXES, seed=0, epoch=0, row=0
            )
            return sample["image"], float(sample["ratio"])
        kind = "resized-crop" if self.resize == CENTRE else "none"
        prepared = build_transform(kind, size, train=False)(image_CHW, seed=0, epoch=0, row=0)
        return prepared.numpy(), 1.0


def _check_values(facts: Mapping[str, Any]) -> None:
    """Refuse facts that no model can have; ValueError names the first."""
    for name, allowed in (
        ("task", ("classification", "detection")),
        ("resize", (STRETCH, CENTRE, CANVAS)),
    ):
        if facts[name] not in allowed:
            raise ValueError(f"{name} {brief(facts[name])} must be one of {', '.join(allowed)}")
    if (facts["resize"] == CANVAS) != (facts["task"] == "detection"):
        raise ValueError(f"resize {facts['resize']} is not that of {facts['task']}")
    if not 1 <= facts["image_size"] <= LARGEST_SIDE:
        raise ValueError(f"image_size {brief(facts['image_size'])} must be 1 to {LARGEST_SIDE}")
    names = facts["class_names"]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"class_names {brief(names)} must be different")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The predictions of a model for one image.

    Attributes:
        name: name of the image's file.
        row: row in a Parquet file, from 0; None for an image file.
        problem: why the image could not be read or decoded; empty if it could.
        label: indices into the class names, best first, int64 (T,).
        score: scores in 0..1, float32 (T,).
        box: sides of the boxes in pixels of the image, float32 (T, 4); None for a classifier.
        content: the encoded image, if requested.
    """

    name: str
    row: int | None
    problem: str
    label: NDArray[np.int64]
    score: NDArray[np.float32]
    box: NDArray[np.float32] | None
    content: bytes


def facts_of(model_file: ModelFile) -> Facts:
    """Return the facts of a model file.

    Raises:
        ConfigError: the model has no classes.
    """
    if not model_file.class_names:
        raise ConfigError(
            f"the {short_name(model_file.name)} has no classes, since it learned feature maps "
            "without labels: train it with labels, with the file as --student-weights"
        )
    data = recorded_settings(model_file.config, where="the model file's settings").get("data", {})
    detection = is_detector(model_file.name)
    resize = CENTRE if data.get("augment") == "resized-crop" else STRETCH
    return Facts(
        model=model_file.name,
        task="detection" if detection else "classification",
        class_names=tuple(model_file.class_names),
        image_size=model_file.image_size[0],
        resize=CANVAS if detection else resize,
    )
