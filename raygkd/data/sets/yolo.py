"""Data sets in YOLO's format: data.yaml, and a text file of boxes or polygons for each image.

Shapes: M boxes of an image, 4 the sides of a box (x0, y0, x1, y1) in fractions of the image.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from raygkd.data.annotations import PHOTOGRAPHS, Annotated, Annotation, detection_source
from raygkd.data.faults import Fault, Faults
from raygkd.data.image_files import image_files, image_suffixes
from raygkd.data.sources import DataSet, Source, SourceOptions, existing_path
from raygkd.data.splits import SPLITS, split_named
from raygkd.errors import DataError
from raygkd.registry import DATASETS
from raygkd.storage.atomic_files import local_path
from raygkd.storage.reading import MOST_SETTINGS_BYTES, parse_yaml, read_bytes, read_text

LAYOUT = (
    "data.yaml with the keys names, train and val, or folders images and labels with classes.txt"
)
# files of class names beside the folders images and labels, one name per line
NAME_FILES = ("classes.txt", "obj.names")


@DATASETS.register("yolo")
class Yolo(DataSet):
    """Images with text files of boxes or polygons, in YOLO's format."""

    task = "detection"
    recipe = PHOTOGRAPHS

    @classmethod
    def recognise(cls, root: Path) -> str | None:
        """Return the name of the YAML file, or of the file of class names."""
        path = root if root.suffix in (".yaml", ".yml") else _description(root)
        return path.name if path is not None else None

    def open(self, options: SourceOptions) -> Source:
        """Return the images with their boxes; polygons become the boxes around them.

        An empty label file, or none, is that of an image without objects.
        """
        root = existing_path("yolo", options)
        path = root if root.is_file() else _description(root)
        if path is None:
            raise DataError(f"no YOLO layout in '{root}': expected {LAYOUT}")
        spec = _read_yaml(path) if path.suffix in (".yaml", ".yml") else _read_names(path)
        names = _class_names(spec, path)
        faults = Faults(options.strict)
        annotated: Annotated = [
            (split, _read_labels(image, names, faults))
            for split in SPLITS
            for image in _images(spec, split, path, faults)
        ]
        return detection_source("yolo", root, list(names.values()), annotated, faults)


def _description(root: Path) -> Path | None:
    """Return the YAML file of a folder, or its file of class names; None without either."""
    paths = [*root.glob("*.yaml"), *root.glob("*.yml")] if root.is_dir() else []
    found = [path for path in sorted(paths) if {"train", "names"} <= _keys(path)]
    found += [path for path in sorted(paths) if {"train", "nc"} <= _keys(path)]
    if not found and (root / "labels").is_dir() and (root / "images").is_dir():
        found = [root / name for name in NAME_FILES if (root / name).is_file()]
    return next((path for path in found if path.stem == "data"), found[0] if found else None)


def _keys(path: Path) -> set[str]:
    try:
        return set(_read_yaml(path))
    except DataError:  # another kind of file
        return set()


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        contents = parse_yaml(read_bytes(path, most=MOST_SETTINGS_BYTES))
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"'{path}' is not YAML: {error}") from error
    if not isinstance(contents, dict):
        raise DataError(f"'{path}' has no keys: expected {LAYOUT}")
    return {str(key): value for key, value in contents.items()}


def _read_names(path: Path) -> dict[str, Any]:
    """Return the contents of a data.yaml for folders images and labels with a list of names."""
    try:
        lines = read_text(path).splitlines()
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}") from error
    folders = [folder for folder in (path.parent / "images").iterdir() if folder.is_dir()]
    splits = {
        split: f"images/{folder.name}"
        for folder in folders
        if (split := split_named(folder.name)) is not None
    }
    return {"names": [line.strip() for line in lines if line.strip()], "train": "images"} | splits


def _class_names(spec: Mapping[str, Any], path: Path) -> dict[int, str]:
    """Return class number -> name."""
    names = spec.get("names")
    if names is None and isinstance(spec.get("nc"), int) and 0 < spec["nc"] < 1 << 16:
        names = [f"class-{number}" for number in range(spec["nc"])]
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        raise DataError(f"'{path}' has no names; add the class names, as a list or as number: name")
    wrong = [key for key in names if not str(key).isdecimal()]
    if wrong:
        raise DataError(f"'{path}': names has {wrong[0]!r}; class numbers must be whole, from 0")
    return {int(key): str(names[key]).strip() for key in sorted(names, key=int)}


def _images(spec: Mapping[str, Any], split: str, path: Path, faults: Faults) -> Iterator[Path]:
    """Yield the images of a split: of folders, globs, and text files that list images."""
    keys = [key for key in spec if split_named(key) == split]
    if not keys and split == "train":
        raise DataError(
            f"'{path}' has no key train; add it, with the folder of the training images"
        )
    for key in keys[:1]:
        entries = spec[key] if isinstance(spec[key], list) else [spec[key]]
        for entry in entries:
            if isinstance(entry, str) and entry.strip():
                yield from _entry_images(entry.strip(), spec, key, path, faults)
            elif entry is not None:
                raise DataError(f"'{path}': {key} has {entry!r}; expected a folder or file")


def _entry_images(
    entry: str, spec: Mapping[str, Any], key: str, path: Path, faults: Faults
) -> Iterator[Path]:
    places = _existing(entry, spec, path)
    if not places:
        raise DataError(
            f"'{path}': {key} names '{entry}', which does not exist below '{_base(spec, path)}'"
        )
    for place in places:
        if place.is_dir():
            # label files may be beside the images
            yield from image_files(place, faults, expected=(".txt", ".cache"))
        elif place.suffix.lower() in image_suffixes():
            yield place
        else:
            yield from _listed_images(place, _base(spec, path))


def _base(spec: Mapping[str, Any], path: Path) -> Path:
    """Return the folder that paths are relative to: ``path`` if it exists, else the file's."""
    given = local_path(str(spec.get("path") or "."))
    base = path.parent / given
    # the data set was moved, or the folder is that of another machine
    return base if os.path.isdir(base) else path.parent


def _existing(entry: str, spec: Mapping[str, Any], path: Path) -> list[Path]:
    """Return the files and folders of an entry, which may be a glob."""
    # some programs write ../train/images for train/images
    for relative in (entry, entry.removeprefix("../")):
        for base in dict.fromkeys((_base(spec, path), path.parent)):
            place = base / local_path(relative)
            if os.path.exists(place):
                return [place]
            if glob.has_magic(relative):
                found = sorted(glob.glob(str(place), recursive=True))
                if found:
                    return [Path(name) for name in found]
    return []


def _listed_images(path: Path, base: Path) -> Iterator[Path]:
    """Yield the images that a text file lists, relative to it or to the base."""
    try:
        lines = read_text(path).splitlines()
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}") from error
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line:
            continue
        if not Path(line).name:
            raise DataError(f"'{path}' line {number}: {line!r} is not the path of an image")
        places = [path.parent / line, base / line]
        yield next((place for place in places if os.path.isfile(place)), places[0])


def label_file(image: Path) -> Path:
    """Return the label file of an image: in ``labels`` instead of the last folder ``images``."""
    folders = list(image.parent.parts)
    if "images" in folders:
        last = len(folders) - 1 - folders[::-1].index("images")
        folders[last] = "labels"
    return Path(*folders, image.name).with_suffix(".txt")


def _read_labels(image: Path, names: Mapping[int, str], faults: Faults) -> Annotation:
    path = label_file(image)
    lines: list[tuple[int, str]] = []
    try:
        text = read_text(path)
        lines = [(n, line) for n, line in enumerate(text.splitlines(), start=1) if line.strip()]
    except FileNotFoundError:
        if os.path.isfile(image):
            faults.add(Fault.NO_LABEL_FILE, str(image))
    # text in another encoding, or a name that no file can have
    except (OSError, ValueError) as error:
        faults.add(Fault.NO_ANNOTATION, str(path), str(error))
    boxes = [_box(line) for _, line in lines]
    return Annotation(
        place=str(path),
        image_id=image.stem,
        image=image,
        size=None,
        marks=[f"line {number}" for number, _ in lines],
        names=[names.get(number, f"id {number}") for number, _ in boxes],
        xyxy=np.array([sides for _, sides in boxes], np.float64).reshape(-1, 4),
        unread={at: line for at, (_, line) in enumerate(lines) if np.isnan(boxes[at][1]).any()},
        difficult=np.zeros(len(boxes), bool),
        crowd=np.zeros(len(boxes), bool),
        fractions=True,
    )


def _box(line: str) -> tuple[int, list[float]]:
    """Return the class number and sides of a line: a box, or a polygon of three points or more."""
    try:
        number, *values = (float(part) for part in line.split())
        label = int(number)
    except (ValueError, OverflowError):
        return -1, [np.nan] * 4
    if len(values) == 4:
        x, y, width, height = values
        return label, [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    if len(values) < 6 or len(values) % 2:
        return label, [np.nan] * 4
    xs, ys = values[0::2], values[1::2]
    return label, [min(xs), min(ys), max(xs), max(ys)]
