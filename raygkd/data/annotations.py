"""Annotated boxes as Pascal VOC's XML and COCO's JSON write them, and what can be wrong with them.

Shapes: M boxes of an image, 4 the sides of a box (x0, y0, x1, y1) in pixels.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PureWindowsPath
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from raygkd.data.boxes import ImageBoxes
from raygkd.errors import DataError

Size = tuple[int, int]

COCO_KEYS: dict[str, dict[str, type]] = {
    "images": {"id": int, "file_name": str},
    "annotations": {"image_id": int, "category_id": int, "bbox": list},
    "categories": {"id": int, "name": str},
}
KINDS = {int: "a whole number", str: "a text", list: "a list"}


class Fault(Enum):
    """What can be wrong with an annotation: what becomes of it, and its name in messages."""

    NO_FILE = "dropped", "image", "without a file"
    NO_ANNOTATION = "dropped", "image", "without a readable annotation"
    REPEATED = "dropped", "image", "entered again"
    WRONG_SIZE = "ignored", "image size", "unlike the file's"
    UNKNOWN_IMAGE = "dropped", "box", "of an unknown image"
    UNKNOWN_CLASS = "dropped", "box", "of an unknown class"
    NOT_FINITE = "dropped", "box", "without four finite numbers"
    NO_AREA = "dropped", "box", "without area"
    OUTSIDE = "dropped", "box", "outside the image"
    BEYOND = "clipped", "box", "beyond the image"

    @property
    def action(self) -> str:
        """What becomes of it where annotations are not strict."""
        return self.value[0]

    def named(self, count: int) -> str:
        """Return "box without area" for one, "boxes without area" for more."""
        _, noun, fault = self.value
        plural = ("es" if noun.endswith("x") else "s") if count > 1 else ""
        return f"{noun}{plural} {fault}"


class Faults:
    """Counts the faults of a data set by kind, or refuses the first one.

    Args:
        strict: refuse.
    """

    def __init__(self, strict: bool):
        self._strict = strict
        self._counts: Counter[Fault] = Counter()
        self._first: dict[Fault, str] = {}

    def add(self, fault: Fault, where: str, detail: str = "") -> None:
        """Count a fault.

        Args:
            fault: its kind.
            where: the file, and the place in it.
            detail: what is wrong there.

        Raises:
            DataError: in strict mode.
        """
        explained = f" ({detail})" if detail else ""
        if self._strict:
            raise DataError(
                f"{where}: {fault.named(1)}{explained}; correct it, or leave out --strict to have "
                f"it {fault.action}"
            )
        self._counts[fault] += 1
        self._first.setdefault(fault, where + explained)

    def warnings(self) -> tuple[str, ...]:
        """Return a line for each kind that occurred: what was done, how often, where first."""
        return tuple(
            f"{fault.action} {count:,} {fault.named(count)}, first in {self._first[fault]}"
            for fault, count in self._counts.items()
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Annotation:
    """What is written about one image; nothing in it is checked.

    Attributes:
        place: the annotation's file, and where it has many images the image; for messages.
        image_id: the image's name or number in its data set.
        image: the image's file.
        size: width and height in pixels, None where they are not written.
        marks: place of each box in the annotation's file ("object 1"), for messages.
        names: class name of each box.
        xyxy: sides of each box in pixels, float64 (M, 4); NaN where there are not four numbers.
        unread: what is written of a box instead of four numbers, by the box's position.
        difficult: as in ``ImageBoxes`` (M,).
        crowd: as in ``ImageBoxes`` (M,).
    """

    place: str
    image_id: str
    image: Path
    size: Size | None
    marks: list[str]
    names: list[str]
    xyxy: NDArray[np.float64]
    unread: Mapping[int, str]
    difficult: NDArray[np.bool_]
    crowd: NDArray[np.bool_]


def read_voc(path: Path, images: Mapping[str, Path], folder: Path) -> Annotation:
    """Read one annotation in Pascal VOC's XML.

    VOC counts pixels from 1 and names the first and the last pixel of a box, so that the box
    (xmin, ymin, xmax, ymax) has the sides (xmin - 1, ymin - 1, xmax, ymax).

    Args:
        path: the XML file; its stem is the image's id.
        images: image files by file name and by stem; the name in the XML is looked up first,
            then the id.
        folder: the image's path is put together with it where ``images`` has neither.

    Raises:
        ValueError: not readable, or not XML.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    # an encoding that Python does not know is a LookupError
    except (ElementTree.ParseError, LookupError) as error:
        raise ValueError(f"not XML: {error}") from error
    # some programs write the whole path, of whatever system
    file_name = PureWindowsPath(root.findtext("filename", "").strip()).name
    objects = root.findall("object")
    written = [
        [box.findtext(f"bndbox/{side}", "").strip() for side in ("xmin", "ymin", "xmax", "ymax")]
        for box in objects
    ]
    corners = [_numbers(sides) for sides in written]
    return Annotation(
        place=str(path),
        image_id=path.stem,
        image=images.get(file_name) or images.get(path.stem) or folder / (file_name or path.stem),
        size=_size(root.findtext("size/width"), root.findtext("size/height")),
        marks=[f"object {number}" for number in range(1, len(objects) + 1)],
        names=[box.findtext("name", "").strip() for box in objects],
        xyxy=np.array(corners).reshape(-1, 4) - [1, 1, 0, 0],
        unread=_unread(written, corners),
        difficult=np.array([box.findtext("difficult", "").strip() == "1" for box in objects], bool),
        crowd=np.zeros(len(objects), bool),
    )


def load_coco(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the lists images, annotations and categories of a COCO instances file.

    Polygons are left out. Each entry has the keys of ``COCO_KEYS``.

    Raises:
        DataError: not readable, not JSON, without one of the lists or keys, or without images.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            contents = json.load(file, object_hook=_without_polygon)
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"'{path}' is not JSON: {error}") from error
    for name, keys in COCO_KEYS.items():
        if not isinstance(contents, dict) or not isinstance(contents.get(name), list):
            raise DataError(
                f"'{path}' has no list '{name}': give a COCO instances file, which has the lists "
                f"{', '.join(COCO_KEYS)}"
            )
        for number, entry in enumerate(contents[name]):
            for key, kind in keys.items():
                if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
                    raise DataError(f"'{path}': {name}[{number}] has no '{key}' ({KINDS[kind]})")
    if not contents["images"]:
        raise DataError(f"'{path}' lists no images: fill its list 'images' or remove the file")
    return contents


def read_coco(
    contents: Mapping[str, list[dict[str, Any]]], path: Path, folder: Path, faults: Faults
) -> tuple[list[str], list[Annotation]]:
    """Return the class names in the order of their category ids, and what is written of each image.

    COCO counts pixels from 0: the box [x, y, width, height] has the sides (x, y, x + width,
    y + height).

    Args:
        contents: as ``load_coco`` returns them.
        path: the file they are from.
        folder: where the images lie.
        faults: is called with ids that two images have, and of boxes of images or categories that
            the file does not have.
    """
    categories = {category["id"]: category["name"] for category in contents["categories"]}
    images: dict[int, dict[str, Any]] = {}
    for image in contents["images"]:
        if image["id"] in images:
            faults.add(Fault.REPEATED, f"{path} image {image['id']}", image["file_name"])
        images.setdefault(image["id"], image)
    boxes: dict[int, list[dict[str, Any]]] = {key: [] for key in images}
    for box in contents["annotations"]:
        if box["image_id"] not in boxes:
            faults.add(Fault.UNKNOWN_IMAGE, f"{path} {_mark(box)}", f"image {box['image_id']}")
        elif box["category_id"] not in categories:
            category = f"category {box['category_id']}"
            faults.add(Fault.UNKNOWN_CLASS, f"{path} {_mark(box)}", category)
        else:
            boxes[box["image_id"]].append(box)
    names = dict.fromkeys(categories[key] for key in sorted(categories))
    sides = {key: [_numbers(box["bbox"]) for box in found] for key, found in boxes.items()}
    return list(names), [
        Annotation(
            place=f"{path} image {key}",
            image_id=str(key),
            image=folder / image["file_name"],
            size=_size(image.get("width"), image.get("height")),
            marks=[_mark(box) for box in boxes[key]],
            names=[categories[box["category_id"]] for box in boxes[key]],
            xyxy=_sides(sides[key]),
            unread=_unread([box["bbox"] for box in boxes[key]], sides[key]),
            difficult=np.zeros(len(boxes[key]), bool),
            crowd=np.array([bool(box.get("iscrowd", 0)) for box in boxes[key]], bool),
        )
        for key, image in images.items()
    ]


def check_boxes(annotation: Annotation, labels: Mapping[str, int], faults: Faults) -> ImageBoxes:
    """Return the boxes of an image that can be used, on the upright image and inside it.

    The size that counts is that of the image's file. Where the file asks for a quarter turn (EXIF
    orientation 5 to 8), the written size tells which image the boxes were drawn on: they are
    turned with the image if that is the stored one. A file that has no readable size counts with
    the written one; its image is refused when it is decoded.

    A clipped box of less than a pixel's width or height is dropped.

    Args:
        annotation: what is written.
        labels: class name -> label.
        faults: is called with each fault.

    Raises:
        DataError: a fault in strict mode.
    """
    upright, xyxy = _upright(annotation, faults)
    # in float32, where a sum that rounding moved beyond the edge is on it again
    with np.errstate(over="ignore"):
        sides = xyxy.astype(np.float32)
    clipped = np.clip(sides, 0, np.array([*upright, *upright], np.float32))
    label = np.array([labels.get(name, -1) for name in annotation.names], np.int64)
    beyond = (clipped != sides).any(axis=1)
    found = {
        Fault.UNKNOWN_CLASS: label < 0,
        Fault.NOT_FINITE: ~np.isfinite(sides).all(axis=1),
        Fault.NO_AREA: (_extents(sides) <= 0).any(axis=1),
        Fault.OUTSIDE: beyond & (_extents(clipped) < 1).any(axis=1),
        Fault.BEYOND: beyond,
    }
    boxes = ImageBoxes(clipped, label, annotation.difficult, annotation.crowd)
    return boxes.keep(_report(annotation, found, faults))


def _upright(annotation: Annotation, faults: Faults) -> tuple[Size, NDArray[np.float64]]:
    """Return the upright image's width and height, and the boxes on it."""
    header = _header(annotation.image)
    if header is None:
        return annotation.size or (0, 0), annotation.xyxy
    stored, orientation = header
    is_turned = orientation in (5, 6, 7, 8)
    upright = (stored[1], stored[0]) if is_turned else stored
    if annotation.size in (None, upright):
        return upright, annotation.xyxy
    if is_turned and annotation.size == stored:
        return upright, _turned(annotation.xyxy, stored, orientation)
    written = "x".join(map(str, annotation.size or ()))
    detail = f"{written}, the file has {upright[0]}x{upright[1]}"
    faults.add(Fault.WRONG_SIZE, annotation.place, detail)
    return upright, annotation.xyxy


def _report(
    annotation: Annotation, found: Mapping[Fault, NDArray[np.bool_]], faults: Faults
) -> NDArray[np.bool_]:
    """Report each box's first fault; return which boxes remain (M,)."""
    remain = np.ones(len(annotation.names), bool)
    for fault, is_faulty in found.items():
        for box in np.flatnonzero(is_faulty & remain):
            sides = " ".join(f"{side:g}" for side in annotation.xyxy[box])
            written = annotation.unread.get(int(box), sides)
            detail = repr(annotation.names[box]) if fault is Fault.UNKNOWN_CLASS else written
            faults.add(fault, f"{annotation.place} {annotation.marks[box]}", detail)
        if fault.action == "dropped":
            remain &= ~is_faulty
    return remain


def _extents(xyxy: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return widths and heights (M, 2)."""
    # infinity less infinity: such boxes are dropped for not being finite
    with np.errstate(invalid="ignore"):
        return xyxy[:, 2:] - xyxy[:, :2]


def _header(path: Path) -> tuple[Size, Any] | None:
    """Return the stored width and height and the EXIF orientation, None for a broken file."""
    try:
        with Image.open(path) as image:
            # Pillow turns a TIFF by itself when it is decoded
            if image.format == "TIFF":
                return ImageOps.exif_transpose(image).size, 1
            # and would decode a PNG to look behind its pixels
            if image.format == "PNG" and "exif" not in image.info:
                return image.size, 1
            return image.size, image.getexif().get(ExifTags.Base.Orientation, 1)
    # broken bytes make Pillow's readers raise nearly anything
    except Exception:
        return None


def _turned(xyxy: NDArray[np.float64], stored: Size, orientation: int) -> NDArray[np.float64]:
    """Return boxes of the stored image on the upright one, for the EXIF orientations 5 to 8."""
    width, height = stored
    x0, y0, x1, y1 = xyxy[:, [1, 0, 3, 2]].T
    if orientation in (6, 7):
        x0, x1 = height - x1, height - x0
    if orientation in (7, 8):
        y0, y1 = width - y1, width - y0
    return np.stack([x0, y0, x1, y1], axis=1)


def _without_polygon(entry: dict[str, Any]) -> dict[str, Any]:
    # most of the file, and of the memory
    entry.pop("segmentation", None)
    return entry


def _mark(box: Mapping[str, Any]) -> str:
    return f"annotation {box['id']}" if "id" in box else "an annotation without id"


def _numbers(values: Any) -> list[float]:
    """Return four numbers, NaN if that is not what the values are."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        numbers = []
    return numbers if len(numbers) == 4 else [math.nan] * 4


def _unread(written: Sequence[Sequence[Any]], numbers: list[list[float]]) -> dict[int, str]:
    """Return what is written of the boxes that have not four numbers, by their position."""
    return {
        box: " ".join(repr(value) for value in written[box])
        for box, sides in enumerate(numbers)
        if np.isnan(sides).all()
    }


def _sides(xywh: list[list[float]]) -> NDArray[np.float64]:
    """Return [x0, y0, x1, y1] for [x, y, width, height]."""
    sides = np.array(xywh, np.float64).reshape(-1, 4)
    # infinity and minus infinity have no sum: not a number, which is what such a box is dropped for
    with np.errstate(invalid="ignore"):
        sides[:, 2:] += sides[:, :2]
    return sides


def _size(width: Any, height: Any) -> Size | None:
    """Return the written width and height, None if there is none, zeros if they are no numbers."""
    if width is None or height is None:
        return None
    sides = _numbers([width, height, 0, 0])
    return (int(sides[0]), int(sides[1])) if np.isfinite(sides).all() else (0, 0)
