"""COCO, and instances files in its format."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raygkd.data.annotations import (
    PHOTOGRAPHS,
    Annotated,
    Annotation,
    annotated_size,
    detection_source,
    four_numbers,
    unread_texts,
)
from raygkd.data.faults import Fault, Faults
from raygkd.data.image_files import split_folders, subfolders
from raygkd.data.sources import DataSet, Source, SourceOptions, existing_path
from raygkd.data.splits import SPLITS, split_named
from raygkd.errors import DataError, brief
from raygkd.registry import DATASETS
from raygkd.storage.reading import read_text

COCO_KEYS: dict[str, dict[str, Any]] = {
    "images": {"id": Hashable, "file_name": str},
    "annotations": {"image_id": Hashable, "category_id": Hashable, "bbox": list},
    "categories": {"id": Hashable, "name": str},
}
KINDS: dict[Any, str] = {Hashable: "a number or string", str: "a string", list: "a list"}
COCO_NAME = re.compile(r"(?:instances_)?((train|val|test)\d*)")
COCO_LAYOUT = (
    "annotations/instances_train*.json with its folder of images, a .json file in each of the "
    "folders train, valid and test, or a single .json file"
)
# how much of a file is looked at to recognise it
HEAD_BYTES = 1 << 16


@DATASETS.register("coco")
class Coco(DataSet):
    """COCO, or any instances file in its format, see ``_coco``."""

    task = "detection"
    score = "map"
    recipe = PHOTOGRAPHS

    @classmethod
    def recognise(cls, root: Path) -> str | None:
        """Return the name of an instances file."""
        files = [root] if root.suffix == ".json" else _json_files(root)
        files = files or [path for paths in _split_files(root).values() for path in paths]
        folder = root if root.is_dir() else root.parent
        return next((str(path.relative_to(folder)) for path in files if _is_coco(path)), None)

    def open(self, options: SourceOptions) -> Source:
        """Return the images with their boxes."""
        return _coco(options)


def _coco(options: SourceOptions) -> Source:
    """COCO (arXiv 1405.0312), or any instances file in its format with a folder of images.

    instances_val is the test split unless there is an instances_test: the test images of COCO
    itself have no public annotations. A single file is all for training. The classes are those of
    the training file, in the order of their ids.
    """
    root = existing_path("coco", options)
    faults = Faults(options.strict)
    annotated: Annotated = []
    class_names: list[str] = []
    # the training file is the first
    for split, path in _coco_files(root).items():
        contents = load_coco(path)
        names, annotations = read_coco(contents, path, _coco_folder(contents, path), faults)
        class_names = class_names or names
        annotated += ((split, annotation) for annotation in annotations)
    return detection_source("coco", root, class_names, annotated, faults)


def load_coco(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the lists images, annotations and categories of a COCO instances file.

    Polygons are omitted. Each entry has the keys of ``COCO_KEYS``.

    Raises:
        DataError: the file cannot be read or is not JSON, a list or key is missing, or there are no
            images.
    """
    try:
        contents = json.loads(read_text(path), object_hook=_without_polygon)
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"'{path}' is not JSON: {brief(str(error), quoted=False)}") from error
    for name, keys in COCO_KEYS.items():
        if not isinstance(contents, dict) or not isinstance(contents.get(name), list):
            raise DataError(
                f"'{path}' has no list '{name}'; use a COCO instances file, which has the lists "
                f"{', '.join(COCO_KEYS)}"
            )
        for number, entry in enumerate(contents[name]):
            for key, kind in keys.items():
                if not isinstance(entry, dict) or not _has(entry, key, kind):
                    raise DataError(f"'{path}': {name}[{number}] has no '{key}' ({KINDS[kind]})")
    for number, image in enumerate(contents["images"]):
        name = os.path.normpath(image["file_name"])
        if os.path.isabs(name) or name.split(os.sep)[0] == os.pardir or "\0" in name:
            raise DataError(
                f"'{path}': images[{number}] has file_name {brief(image['file_name'])}, which is "
                "outside the folder of the images; move the image there"
            )
    if not contents["images"]:
        raise DataError(f"'{path}' lists no images: fill its list 'images' or remove the file")
    return contents


def _has(entry: Mapping[str, Any], key: str, kind: Any) -> bool:
    return entry.get(key) is not None and isinstance(entry[key], kind)


def read_coco(
    contents: Mapping[str, list[dict[str, Any]]], path: Path, folder: Path, faults: Faults
) -> tuple[list[str], list[Annotation]]:
    """Return the class name of each category, and each image's annotation.

    Categories are in the order of their ids if all are numbers, else in that of the file. Ids are
    compared as they are written: "7" is not 7.

    COCO counts pixels from 0: the sides of a box [x, y, width, height] are (x, y, x + width,
    y + height).

    Args:
        contents: result of ``load_coco``.
        path: path of the file.
        folder: folder of the images.
        faults: collects repeated image ids, and boxes of unknown images or categories.
    """
    categories = {category["id"]: category["name"] for category in contents["categories"]}
    images: dict[Hashable, dict[str, Any]] = {}
    for image in contents["images"]:
        if image["id"] in images:
            faults.add(Fault.REPEATED, f"{path} image {image['id']}", image["file_name"])
        images.setdefault(image["id"], image)
    boxes: dict[Hashable, list[dict[str, Any]]] = {key: [] for key in images}
    for box in contents["annotations"]:
        if box["image_id"] not in boxes:
            faults.add(Fault.UNKNOWN_IMAGE, f"{path} {_mark(box)}", f"image {box['image_id']}")
        elif box["category_id"] not in categories:
            category = f"category {box['category_id']}"
            faults.add(Fault.UNKNOWN_CLASS, f"{path} {_mark(box)}", category)
        else:
            boxes[box["image_id"]].append(box)
    are_numbers = all(isinstance(key, int | float) for key in categories)
    names = [categories[key] for key in (sorted(categories) if are_numbers else categories)]
    sides = {key: [four_numbers(box["bbox"]) for box in entries] for key, entries in boxes.items()}
    return names, [
        Annotation(
            place=f"{path} image {key}",
            image_id=str(key),
            image=folder / image["file_name"],
            size=annotated_size(image.get("width"), image.get("height")),
            marks=[_mark(box) for box in boxes[key]],
            names=[categories[box["category_id"]] for box in boxes[key]],
            xyxy=_sides(sides[key]),
            unread=unread_texts([box["bbox"] for box in boxes[key]], sides[key]),
            difficult=np.zeros(len(boxes[key]), bool),
            crowd=np.array([bool(box.get("iscrowd", 0)) for box in boxes[key]], bool),
        )
        for key, image in images.items()
    ]


def _without_polygon(entry: dict[str, Any]) -> dict[str, Any]:
    # polygons are most of the file and would take most of the memory
    entry.pop("segmentation", None)
    return entry


def _mark(box: Mapping[str, Any]) -> str:
    return f"annotation {box['id']}" if "id" in box else "an annotation without id"


def _sides(xywh: list[list[float]]) -> NDArray[np.float64]:
    """Return [x0, y0, x1, y1] for [x, y, width, height]."""
    sides = np.array(xywh, np.float64).reshape(-1, 4)
    # infinity plus minus infinity is NaN; such boxes are dropped as not finite
    with np.errstate(invalid="ignore"):
        sides[:, 2:] += sides[:, :2]
    return sides


def _coco_files(root: Path) -> dict[str, Path]:
    """Return split -> instances file, in the order of ``SPLITS``."""
    if root.is_file():
        return {"train": root}
    files = _json_files(root)
    if not files:
        return _files_of_folders(root)
    named = [(match[2], path) for path in files if (match := COCO_NAME.fullmatch(path.stem))]
    named = named or [(s, path) for path in files if (s := split_named(path.stem)) is not None]
    found = dict(named)
    if len(named) == 1 or (not named and len(files) == 1):
        return {"train": named[0][1] if named else files[0]}
    if len(found) < len(named):
        names = " ".join(str(path.relative_to(root)) for _, path in named)
        raise DataError(f"several files for one split in '{root}': {names}; keep one per split")
    if "train" not in found:
        raise _no_training_file(root, files)
    return _tested(found)


def _files_of_folders(root: Path) -> dict[str, Path]:
    """Return split -> instances file of folders named after splits."""
    found = _split_files(root)
    for files in found.values():
        if len(files) > 1:
            names = " ".join(str(path.relative_to(root)) for path in files)
            raise DataError(f"several files for one split in '{root}': {names}; keep one per split")
    if "train" not in found:
        raise _no_training_file(root, [path for files in found.values() for path in files])
    return _tested({split: files[0] for split, files in found.items()})


def _tested(found: Mapping[str, Path]) -> dict[str, Path]:
    """Return the files of the splits, in order; validation becomes the test if there is none."""
    files = dict(found)
    if "val" in files and "test" not in files:
        files["test"] = files.pop("val")
    return {split: files[split] for split in SPLITS if split in files}


def _no_training_file(root: Path, files: list[Path]) -> DataError:
    names = " ".join(str(path.relative_to(root)) for path in files) or "none"
    return DataError(f"no training annotations in '{root}': expected {COCO_LAYOUT}; found {names}")


def _json_files(root: Path) -> list[Path]:
    return sorted([*root.glob("annotations/*.json"), *root.glob("*.json")])


def _split_files(root: Path) -> dict[str, list[Path]]:
    """Return split -> JSON files, for folders named after splits that have some."""
    folders = split_folders(root) if root.is_dir() else {}
    found = {split: _json_files(folder) for split, folder in folders.items()}
    return {split: files for split, files in found.items() if files}


def _is_coco(path: Path) -> bool:
    """Return whether a file begins like an instances file."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    keys = (b'"images"', b'"annotations"', b'"categories"', b'"info"', b'"licenses"')
    return any(key in head for key in keys)


def _coco_folder(contents: dict, path: Path) -> Path:
    """Return the folder that an instances file's images lie in.

    For instances_NAME.json it is the folder NAME, beside the file or beside its folder
    annotations, if it holds any of them; otherwise the first one there that does, or the one above.
    """
    above = path.parent.parent if path.parent.name == "annotations" else path.parent
    folders = [above, *subfolders(above), above.parent]
    match = COCO_NAME.fullmatch(path.stem)
    if match is not None:
        folders.insert(0, above / match[1])
    names = [image["file_name"] for image in contents["images"]]
    for folder in folders:
        if any(os.path.isfile(folder / name) for name in names):
            return folder
    raise DataError(f"no folder in '{above}' contains images of '{path}', such as '{names[0]}'")
