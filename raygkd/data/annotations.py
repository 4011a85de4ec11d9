"""Reading and checking of box annotations in Pascal VOC's XML and COCO's JSON.

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
KINDS = {int: "a whole number", str: "a string", list: "a list"}


class Fault(Enum):
    """A kind of faulty annotation: how it is handled, and its name in messages."""

    NO_FILE = "dropped", "image", "without a file"
    NO_ANNOTATION = "dropped", "image", "without a readable annotation"
    REPEATED = "dropped", "image", "listed more than once"
    WRONG_SIZE = "ignored", "image size", "different from the file's"
    UNKNOWN_IMAGE = "dropped", "box", "of an unknown image"
    UNKNOWN_CLASS = "dropped", "box", "of an unknown class"
    NOT_FINITE = "dropped", "box", "without four finite numbers"
    NO_AREA = "dropped", "box", "without area"
    OUTSIDE = "dropped", "box", "outside the image"
    BEYOND = "clipped", "box", "partly outside the image"

    @property
    def action(self) -> str:
        """How it is handled if annotations are not strict."""
        return self.value[0]

    def describe(self, count: int) -> str:
        """Return "box without area" for one, "boxes without area" for more."""
        _, noun, fault = self.value
        plural = ("es" if noun.endswith("x") else "s") if count > 1 else ""
        return f"{noun}{plural} {fault}"


class Faults:
    """Counts the faults of a data set by kind, or raises at the first one.

    Args:
        strict: whether to raise.
    """

    def __init__(self, strict: bool):
        self._strict = strict
        self._counts: Counter[Fault] = Counter()
        self._first: dict[Fault, str] = {}

    def add(self, fault: Fault, where: str, detail: str = "") -> None:
        """Count a fault.

        Args:
            fault: its kind.
            where: the file and the position in it.
            detail: the faulty value.

        Raises:
            DataError: in strict mode.
        """
        suffix = f" ({detail})" if detail else ""
        if self._strict:
            raise DataError(
                f"{where}: {fault.describe(1)}{suffix}; correct it, or omit --strict to have it "
                f"{fault.action}"
            )
        self._counts[fault] += 1
        self._first.setdefault(fault, where + suffix)

    def warnings(self) -> tuple[str, ...]:
        """Return a line per kind of fault: how it was handled, how often, and where first."""
        return tuple(
            f"{fault.action} {count:,} {fault.describe(count)}, first in {self._first[fault]}"
            for fault, count in self._counts.items()
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Annotation:
    """The annotation of one image, not checked yet.

    Attributes:
        place: the annotation's file and, if it has many images, the image; for messages.
        image_id: the image's name or number in its data set.
        image: the image's file.
        size: annotated width and height in pixels; None if missing.
        marks: position of each box in the annotation's file ("object 1"), for messages.
        names: class name of each box.
        xyxy: sides of each box in pixels, float64 (M, 4); NaN if there are not four numbers.
        unread: index of a box without four numbers -> its text in the file.
        difficult: see ``ImageBoxes`` (M,).
        crowd: see ``ImageBoxes`` (M,).
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

    VOC counts pixels from 1 and stores the first and last pixel of a box, so the sides of a box
    (xmin, ymin, xmax, ymax) are (xmin - 1, ymin - 1, xmax, ymax).

    Args:
        path: the XML file; its stem is the image's id.
        images: image files by file name and by stem; the name in the XML is looked up first,
            then the id.
        folder: folder of the image if ``images`` has neither.

    Raises:
        ValueError: the file cannot be read or is not XML.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    # an encoding unknown to Python raises LookupError
    except (ElementTree.ParseError, LookupError) as error:
        raise ValueError(f"not XML: {error}") from error
    # some programs write the full path, of any operating system
    file_name = PureWindowsPath(root.findtext("filename", "").strip()).name
    objects = root.findall("object")
    texts = [
        [box.findtext(f"bndbox/{side}", "").strip() for side in ("xmin", "ymin", "xmax", "ymax")]
        for box in objects
    ]
    corners = [_numbers(sides) for sides in texts]
    return Annotation(
        place=str(path),
        image_id=path.stem,
        image=images.get(file_name) or images.get(path.stem) or folder / (file_name or path.stem),
        size=_size(root.findtext("size/width"), root.findtext("size/height")),
        marks=[f"object {number}" for number in range(1, len(objects) + 1)],
        names=[box.findtext("name", "").strip() for box in objects],
        xyxy=np.array(corners).reshape(-1, 4) - [1, 1, 0, 0],
        unread=_unread(texts, corners),
        difficult=np.array([box.findtext("difficult", "").strip() == "1" for box in objects], bool),
        crowd=np.zeros(len(objects), bool),
    )


def load_coco(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the lists images, annotations and categories of a COCO instances file.

    Polygons are omitted. Each entry has the keys of ``COCO_KEYS``.

    Raises:
        DataError: the file cannot be read or is not JSON, a list or key is missing, or there are no
            images.
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
                f"'{path}' has no list '{name}': use a COCO instances file, which has the lists "
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
    """Return the class names in the order of their category ids, and each image's annotation.

    COCO counts pixels from 0: the sides of a box [x, y, width, height] are (x, y, x + width,
    y + height).

    Args:
        contents: result of ``load_coco``.
        path: path of the file.
        folder: folder of the images.
        faults: collects repeated image ids, and boxes of unknown images or categories.
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
    sides = {key: [_numbers(box["bbox"]) for box in entries] for key, entries in boxes.items()}
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
    header = _header(annotation.image)
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


def _header(path: Path) -> tuple[Size, Any] | None:
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


def _without_polygon(entry: dict[str, Any]) -> dict[str, Any]:
    # polygons are most of the file and would take most of the memory
    entry.pop("segmentation", None)
    return entry


def _mark(box: Mapping[str, Any]) -> str:
    return f"annotation {box['id']}" if "id" in box else "an annotation without id"


def _numbers(values: Any) -> list[float]:
    """Return values as four numbers; all NaN if they are not four numbers."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        numbers = []
    return numbers if len(numbers) == 4 else [math.nan] * 4


def _unread(values: Sequence[Sequence[Any]], numbers: list[list[float]]) -> dict[int, str]:
    """Return the text of the boxes that do not have four numbers, by index."""
    return {
        box: " ".join(repr(value) for value in values[box])
        for box, sides in enumerate(numbers)
        if np.isnan(sides).all()
    }


def _sides(xywh: list[list[float]]) -> NDArray[np.float64]:
    """Return [x0, y0, x1, y1] for [x, y, width, height]."""
    sides = np.array(xywh, np.float64).reshape(-1, 4)
    # infinity plus minus infinity is NaN; such boxes are dropped as not finite
    with np.errstate(invalid="ignore"):
        sides[:, 2:] += sides[:, :2]
    return sides


def _size(width: Any, height: Any) -> Size | None:
    """Return the annotated width and height; None if missing, zeros if they are not numbers."""
    if width is None or height is None:
        return None
    sides = _numbers([width, height, 0, 0])
    return (int(sides[0]), int(sides[1])) if np.isfinite(sides).all() else (0, 0)
