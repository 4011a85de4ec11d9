"""Checking of box annotations, and the data sets made of them.

Shapes: M boxes of an image or of all, 4 the sides of a box (x0, y0, x1, y1) in pixels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from raygkd.data.boxes import ImageBoxes
from raygkd.data.faults import Fault, Faults, report_class_names
from raygkd.data.image_files import read_of
from raygkd.data.sources import Sample, Source
from raygkd.errors import DataError

# a pair for photographs, and how it is trained
PHOTOGRAPHS = {
    "teacher": "fasterrcnn_resnet50_fpn",
    "student": "fasterrcnn_resnet18_fpn",
    "teacher_epochs": 20,
    "lr": 1e-4,
}
# share of a data set's boxes from which on a fault has one cause
NEARLY_ALL = 0.9
# annotations in fractions are rounded; sides that far from the edge lie on it, in pixels
ROUNDING = 0.5

Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class Annotation:
    """The annotation of one image, not checked yet.

    Attributes:
        place: the annotation's file and, if it has many images, the image; for messages.
        image_id: the image's name or number in its data set.
        image: the image's file, or its contents.
        size: annotated width and height in pixels; None if missing.
        marks: position of each box in the annotation's file ("object 1"), for messages.
        names: class name of each box.
        xyxy: sides of each box in pixels, float64 (M, 4); NaN if there are not four numbers.
        unread: index of a box without four numbers -> its text in the file.
        difficult: see ``ImageBoxes`` (M,).
        crowd: see ``ImageBoxes`` (M,).
        fractions: the sides are fractions of the upright image's width and height instead.
    """

    place: str
    image_id: str
    image: Path | BinaryIO
    size: Size | None
    marks: list[str]
    names: list[str]
    xyxy: NDArray[np.float64]
    unread: Mapping[int, str]
    difficult: NDArray[np.bool_]
    crowd: NDArray[np.bool_]
    fractions: bool = False


Annotated = list[tuple[str, Annotation]]
"""Split and contents of each annotation."""


def detection_source(
    name: str, root: Path, class_names: Sequence[str], annotated: Annotated, faults: Faults
) -> Source:
    """Return the existing images, each once, with their valid boxes.

    Raises:
        DataError: no training image has a valid box, or a fault in strict mode.
    """
    report_class_names(class_names, str(root), faults)
    labels = {class_name: label for label, class_name in enumerate(dict.fromkeys(class_names))}
    _report_unit(annotated, faults)
    samples: dict[Path, Sample] = {}
    for split, annotation in annotated:
        path = Path(str(annotation.image))
        if path in samples:
            faults.add(Fault.REPEATED, annotation.place, str(path))
        elif not os.path.isfile(path):
            faults.add(Fault.NO_FILE, annotation.place, str(path))
        else:
            boxes = check_boxes(annotation, labels, faults)
            samples[path] = Sample(0, split, str(path), read_of(path), boxes, annotation.image_id)
    if not annotated or not annotated[0][1].fractions:
        _report_leaving(annotated, faults)
    if not any(sample.boxes for sample in samples.values() if sample.split == "train"):
        dropped = "; ".join(faults.warnings()) or "the training annotations have none"
        raise DataError(f"no usable training boxes in '{root}': {dropped}")
    return Source(name, tuple(labels), list(samples.values()), faults.warnings())


def _report_unit(annotated: Annotated, faults: Faults) -> None:
    """Report the likely cause if nearly all boxes are in 0..1, or in pixels instead."""
    known = [annotation for _, annotation in annotated if annotation.names]
    if not known:
        return
    xyxy_M4 = np.concatenate([annotation.xyxy for annotation in known])
    if known[0].fractions:
        if _are_nearly_all((xyxy_M4 > 1).any(axis=1)):
            cause = "nearly all boxes exceed 1, so they are in pixels, not in fractions"
            faults.add(Fault.UNIT, known[0].place, cause)
    elif _are_nearly_all(((xyxy_M4 >= -1) & (xyxy_M4 <= 1)).all(axis=1)):
        cause = "nearly all boxes lie in 0..1, so they are in fractions, not in pixels"
        faults.add(Fault.UNIT, known[0].place, cause)


def _report_leaving(annotated: Annotated, faults: Faults) -> None:
    """Report the likely cause if nearly all boxes leave their images."""
    boxes = sum(len(annotation.names) for _, annotation in annotated)
    if boxes and faults.count(Fault.OUTSIDE, Fault.BEYOND) >= NEARLY_ALL * boxes:
        cause = (
            "nearly all boxes extend beyond their images: corners were read as width and height or "
            "the reverse, or the images were resized after annotation"
        )
        faults.add(Fault.UNIT, annotated[0][1].place, cause)


def _are_nearly_all(chosen_M: Any) -> bool:
    return bool(np.mean(chosen_M) >= NEARLY_ALL)


def check_boxes(annotation: Annotation, labels: Mapping[str, int], faults: Faults) -> ImageBoxes:
    """Return the valid boxes of an image, clipped to the upright image.

    The size of the image is read from its file. If the file is to be rotated by a quarter turn
    (EXIF orientation 5 to 8), the annotated size shows on which image the boxes were drawn: if it
    is the size of the stored image, the boxes are rotated too. If the size cannot be read from the
    file, the annotated size is used; decoding the image will fail later.

    A clipped box less than one pixel wide or high is dropped.

    Args:
        annotation: the annotation.
        labels: class name -> label.
        faults: collects the faults.

    Raises:
        DataError: a fault in strict mode.
    """
    upright, xyxy = _upright(annotation, faults)
    # in float32, a sum that rounding errors moved beyond the edge lies on the edge again
    with np.errstate(over="ignore"):
        sides = xyxy.astype(np.float32)
    clipped = np.clip(sides, 0, np.array([*upright, *upright], np.float32))
    label = np.array([labels.get(name, -1) for name in annotation.names], np.int64)
    beyond = (clipped != sides).any(axis=1)
    faulty = {
        Fault.UNKNOWN_CLASS: label < 0,
        Fault.NOT_FINITE: ~np.isfinite(sides).all(axis=1),
        Fault.NO_AREA: (_extents(sides) <= 0).any(axis=1),
        Fault.OUTSIDE: beyond & (_extents(clipped) < 1).any(axis=1),
        Fault.BEYOND: beyond,
    }
    boxes = ImageBoxes(clipped, label, annotation.difficult, annotation.crowd)
    return boxes.keep(_report(annotation, faulty, faults))


def _upright(annotation: Annotation, faults: Faults) -> tuple[Size, NDArray[np.float64]]:
    """Return the upright image's width and height, and the boxes on it."""
    header = image_header(annotation.image)
    if annotation.fractions:
        return _scaled(annotation, header)
    if header is None:
        return annotation.size or (0, 0), annotation.xyxy
    stored, orientation = header
    is_rotated = orientation in (5, 6, 7, 8)
    upright = (stored[1], stored[0]) if is_rotated else stored
    if annotation.size in (None, upright):
        return upright, annotation.xyxy
    if is_rotated and annotation.size == stored:
        return upright, _rotated(annotation.xyxy, stored, orientation)
    annotated = "x".join(map(str, annotation.size or ()))
    detail = f"{annotated}, the file has {upright[0]}x{upright[1]}"
    faults.add(Fault.WRONG_SIZE, annotation.place, detail)
    return upright, annotation.xyxy


def _scaled(
    annotation: Annotation, header: tuple[Size, Any] | None
) -> tuple[Size, NDArray[np.float64]]:
    """Return the upright image's width and height, and boxes given in fractions, in pixels."""
    (width, height), orientation = header or ((1, 1), 1)
    upright = (height, width) if orientation in (5, 6, 7, 8) else (width, height)
    sides = np.array([*upright, *upright], np.float64)
    xyxy_M4 = annotation.xyxy * sides
    inside_M4 = np.clip(xyxy_M4, 0, sides)
    return upright, np.where(np.abs(xyxy_M4 - inside_M4) < ROUNDING, inside_M4, xyxy_M4)


def _report(
    annotation: Annotation, faulty: Mapping[Fault, NDArray[np.bool_]], faults: Faults
) -> NDArray[np.bool_]:
    """Report each box's first fault; return a mask of the boxes to keep (M,)."""
    remain = np.ones(len(annotation.names), bool)
    for fault, is_faulty in faulty.items():
        for box in np.flatnonzero(is_faulty & remain):
            sides = " ".join(f"{side:g}" for side in annotation.xyxy[box])
            text = annotation.unread.get(int(box), sides)
            detail = repr(annotation.names[box]) if fault is Fault.UNKNOWN_CLASS else text
            faults.add(fault, f"{annotation.place} {annotation.marks[box]}", detail)
        if fault.action == "dropped":
            remain &= ~is_faulty
    return remain


def _extents(xyxy: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return widths and heights (M, 2)."""
    # infinity minus infinity is NaN; such boxes are dropped as not finite
    with np.errstate(invalid="ignore"):
        return xyxy[:, 2:] - xyxy[:, :2]


def image_header(path: Path | BinaryIO) -> tuple[Size, Any] | None:
    """Return the stored width and height and the EXIF orientation; None for an unreadable file."""
    try:
        with Image.open(path) as image:
            # Pillow rotates a TIFF itself when it decodes it
            if image.format == "TIFF":
                return ImageOps.exif_transpose(image).size, 1
            # Pillow would decode the whole PNG to look for EXIF data after its pixels
            if image.format == "PNG" and "exif" not in image.info:
                return image.size, 1
            return image.size, image.getexif().get(ExifTags.Base.Orientation, 1)
    # Pillow's readers raise almost any type of exception for corrupt files
    except Exception:
        return None


def _rotated(xyxy: NDArray[np.float64], stored: Size, orientation: int) -> NDArray[np.float64]:
    """Return boxes of the stored image on the upright one, for EXIF orientations 5 to 8."""
    width, height = stored
    x0, y0, x1, y1 = xyxy[:, [1, 0, 3, 2]].T
    if orientation in (6, 7):
        x0, x1 = height - x1, height - x0
    if orientation in (7, 8):
        y0, y1 = width - y1, width - y0
    return np.stack([x0, y0, x1, y1], axis=1)


def four_numbers(values: Any) -> list[float]:
    """Return values as four numbers; all NaN if they are not four numbers."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        numbers = []
    return numbers if len(numbers) == 4 else [math.nan] * 4


def unread_texts(values: Sequence[Sequence[Any]], numbers: list[list[float]]) -> dict[int, str]:
    """Return the text of the boxes that do not have four numbers, by index."""
    return {
        box: " ".join(repr(value) for value in values[box])
        for box, sides in enumerate(numbers)
        if np.isnan(sides).all()
    }


def annotated_size(width: Any, height: Any) -> Size | None:
    """Return the annotated width and height; None if missing, zeros if they are not numbers."""
    if width is None or height is None:
        return None
    sides = four_numbers([width, height, 0, 0])
    return (int(sides[0]), int(sides[1])) if np.isfinite(sides).all() else (0, 0)
