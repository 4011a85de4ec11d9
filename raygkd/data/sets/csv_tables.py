"""Tables of images in CSV or TSV files: labels, or boxes, and perhaps splits."""

from __future__ import annotations

import codecs
import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np

from raygkd.data.annotations import (
    Annotation,
    annotated_size,
    detection_source,
    four_numbers,
    unread_texts,
)
from raygkd.data.faults import Fault, Faults, report_class_names
from raygkd.data.image_files import image_files, read_of, split_folders
from raygkd.data.label_values import check_single_labels, ordered_classes
from raygkd.data.sources import DataSet, Sample, Source, SourceOptions, existing_path
from raygkd.data.splits import SPLIT_NAMES, SPLITS, split_named
from raygkd.errors import ConfigError, DataError, brief
from raygkd.registry import DATASETS, option
from raygkd.storage.reading import read_bytes

SUFFIXES = (".csv", ".tsv")
DELIMITERS = ",;\t|"
# names of columns, in lower case, best first
COLUMNS = {
    "image": (
        "image", "file_name", "filename", "file", "path", "image_path", "filepath", "file_path",
        "image_name", "img", "image_id",
    ),
    "label": (
        "label", "class", "category", "class_name", "label_name", "category_name", "target",
    ),
    "split": ("split", "subset", "set", "partition", "usage"),
}  # fmt: skip
CORNERS = (
    ("xmin", "ymin", "xmax", "ymax"), ("x_min", "y_min", "x_max", "y_max"),
    ("x0", "y0", "x1", "y1"), ("x1", "y1", "x2", "y2"), ("left", "top", "right", "bottom"),
)  # fmt: skip
SIDES = (("x", "y", "w", "h"), ("x", "y", "width", "height"))
EXPECTED = (
    "image and label, optionally split, and for boxes xmin, ymin, xmax and ymax, or x, y, w and h"
)
# tables of a folder that has several, by name
MAIN_NAMES = ("labels", "annotations", "metadata", "_annotations")


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        place: the file and the line, for messages.
        split: its split.
        values: column -> text, without spaces around it.
    """

    place: str
    split: str
    values: Mapping[str, str]


@DATASETS.register("csv")
class CsvTable(DataSet):
    """A CSV or TSV file with columns image and label, or boxes."""

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        """Names of the columns."""

        image: str = option("", "column of the image files [default: found by its name]")
        label: str = option("", "column of the labels [default: found by its name]")
        split: str = option("", "column of the splits [default: found by its name, if any]")

    @classmethod
    def recognise(cls, root: Path) -> str | None:
        """Return the name of a table with columns of images and labels."""
        files = [root] if root.suffix.lower() in SUFFIXES else []
        if root.is_dir():
            files = list(_tables(root).values()) or _table_files(root)
        for path in files:
            names = {name.strip().lower() for name in _header(path)}
            if names & set(COLUMNS["image"]) and names & set(COLUMNS["label"]):
                return path.name
        return None

    def open(self, options: SourceOptions) -> Source:
        """Return the images with their labels or boxes.

        Images are found by their path from the table or the folder, or else by a name, with or
        without suffix, that occurs once.
        """
        root = existing_path("csv", options)
        folder = root.parent if root.is_file() else root
        tables = {"train": root} if root.is_file() else _tables(root)
        if not tables:
            found = " ".join(path.name for path in _table_files(root)) or "none"
            raise DataError(
                f"no table in '{root}': expected one .csv or .tsv file, or one for each split; "
                f"found {found}"
            )
        rows: list[Row] = []
        for split, path in tables.items():
            columns = _columns(_header(path), options.own, path)
            rows += _rows(path, split, columns)
        if not rows:
            raise DataError(f"'{root}' lists no images; add rows below the header")
        faults = Faults(options.strict)
        finder = _Finder([folder, *{path.parent for path in tables.values()}])
        if "xmin" in columns or "w" in columns:
            annotated = [(row.split, a) for row, a in _annotations(rows, finder)]
            names = ordered_classes(name for _, a in annotated for name in a.names if name)
            return detection_source("csv", root, names, annotated, faults)
        source = _labelled(rows, finder, root, faults)
        finder.report_unlisted(faults)
        return Source("csv", source.class_names, source.samples, faults.warnings())


class _Finder:
    """Finds image files by the names in a table.

    Args:
        folders: folders that paths may be relative to; images are searched for below the first.
    """

    def __init__(self, folders: Sequence[Path]):
        self._folders = folders
        self._by_name: dict[str, list[Path]] = {}
        self._listed: set[Path] = set()
        self._files = image_files(folders[0])
        for path in self._files:
            for name in {path.name, path.stem}:
                self._by_name.setdefault(name, []).append(path)

    def find(self, text: str) -> Path:
        """Return the image's file, or the place where it was expected."""
        relative = text.replace("\\", "/")
        for folder in self._folders:
            if os.path.isfile(folder / relative):
                return self._note(folder / relative)
        found = self._by_name.get(PureWindowsPath(text).name, [])
        return self._note(found[0]) if len(found) == 1 else self._folders[0] / relative

    def _note(self, path: Path) -> Path:
        self._listed.add(path)
        return path

    def report_unlisted(self, faults: Faults) -> None:
        """Report the images that were never found."""
        for path in self._files:
            if path not in self._listed:
                faults.add(Fault.UNLISTED, str(path))


def _labelled(rows: Sequence[Row], finder: _Finder, root: Path, faults: Faults) -> Source:
    """Return the images with their labels."""
    for row in rows:
        if not row.values["label"]:
            raise DataError(f"{row.place}: no label; every row needs one")
    check_single_labels([row.values["label"] for row in rows], str(root))
    names = ordered_classes(row.values["label"] for row in rows)
    report_class_names(names, str(root), faults)
    labels = {name: label for label, name in enumerate(names)}
    samples: dict[Path, Sample] = {}
    for row in rows:
        path, label = finder.find(row.values["image"]), labels[row.values["label"]]
        if not os.path.isfile(path):
            faults.add(Fault.NO_FILE, row.place, row.values["image"])
        elif path not in samples:
            samples[path] = Sample(label, row.split, str(path), read_of(path))
        elif samples[path].label != label:
            raise DataError(
                f"{row.place}: {row.values['image']} has the labels {names[samples[path].label]} "
                f"and {row.values['label']} (multi-label data); only one label per image is "
                "supported"
            )
        else:
            faults.add(Fault.REPEATED, row.place, row.values["image"])
    if not samples:
        raise DataError(f"'{root}' lists no existing image, such as {rows[0].values['image']!r}")
    return Source("csv", tuple(names), list(samples.values()))


def _annotations(rows: Sequence[Row], finder: _Finder) -> Iterator[tuple[Row, Annotation]]:
    """Yield the boxes of each image, and its first row; a row without sides has no box."""
    images: dict[str, list[Row]] = {}
    for row in rows:
        images.setdefault(row.values["image"], []).append(row)
    for name, listed in images.items():
        boxed = [row for row in listed if any(_side_texts(row))]
        texts = [_side_texts(row) for row in boxed]
        sides = [four_numbers(values) for values in texts]
        xyxy_M4 = np.array(sides, np.float64).reshape(-1, 4)
        if boxed and "w" in boxed[0].values:
            with np.errstate(invalid="ignore"):
                xyxy_M4[:, 2:] += xyxy_M4[:, :2]
        size = [listed[0].values.get(side) for side in ("width", "height")]
        yield (
            listed[0],
            Annotation(
                place=listed[0].place,
                image_id=PureWindowsPath(name).stem,
                image=finder.find(name),
                size=annotated_size(*size) if "xmin" in listed[0].values and all(size) else None,
                marks=[f"({row.place})" for row in boxed],
                names=[row.values["label"] for row in boxed],
                xyxy=xyxy_M4,
                unread=unread_texts(texts, sides),
                difficult=np.zeros(len(boxed), bool),
                crowd=np.zeros(len(boxed), bool),
            ),
        )


def _side_texts(row: Row) -> list[str]:
    names = CORNERS[0] if "xmin" in row.values else SIDES[0]
    return [row.values[name] for name in names]


def _table_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def _tables(root: Path) -> dict[str, Path]:
    """Return split -> table; one for all splits is that of "train"."""
    files = _table_files(root)
    of_split = {split: path for path in files if (split := split_named(path.stem)) is not None}
    if "train" in of_split and len(of_split) > 1:
        return {split: of_split[split] for split in SPLITS if split in of_split}
    main = [path for path in files if path.stem.lower() in MAIN_NAMES] or files
    if len(main) == 1:
        return {"train": main[0]}
    inner = {split: _table_files(folder) for split, folder in split_folders(root).items()}
    if not files and inner.get("train") and all(len(found) <= 1 for found in inner.values()):
        return {split: inner[split][0] for split in SPLITS if inner.get(split)}
    return {}


def _text(path: Path) -> str:
    try:
        content = read_bytes(path)
        is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is not UTF-8: {error}; save it as UTF-8") from error


def _header(path: Path) -> list[str]:
    first = next(_records(path), None)
    return first[1] if first is not None else []


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of the line and the fields of each record, the header first."""
    text = _text(path)
    line = text.lstrip().partition("\n")[0]
    delimiter = max(DELIMITERS, key=line.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                yield reader.line_num, fields
    except csv.Error as error:
        raise DataError(f"'{path}' line {reader.line_num}: {error}") from error


def _columns(header: Sequence[str], own: Mapping[str, str], path: Path) -> dict[str, int]:
    """Return what a column is ("image", "label", "split", "xmin", ...) -> its position."""
    names = [name.strip().lower() for name in header]
    found: dict[str, int] = {}
    for column, known in COLUMNS.items():
        wanted = own[column].strip().lower()
        if wanted and wanted not in names:
            raise ConfigError(
                f"csv.{column} {own[column]!r}: not a column of '{path}' (columns: "
                f"{', '.join(header)})"
            )
        name = wanted or next((name for name in known if name in names), None)
        if name is not None:
            if names.count(name) > 1:
                raise DataError(f"'{path}' has the column {brief(name)} twice; rename one of them")
            found[column] = names.index(name)
    if "image" not in found or "label" not in found:
        raise DataError(
            f"'{path}' has the columns {', '.join(header) or 'none'}; expected {EXPECTED}, or "
            "--set csv.image=COLUMN and csv.label=COLUMN"
        )
    for sets, ours in ((CORNERS, CORNERS[0]), (SIDES, SIDES[0])):
        sides = next((sides for sides in sets if set(sides) <= set(names)), None)
        if sides is not None:
            found |= {our: names.index(side) for our, side in zip(ours, sides)}
            break
    if "xmin" in found:
        found |= {side: names.index(side) for side in ("width", "height") if side in names}
    return found


def _rows(path: Path, split: str, columns: Mapping[str, int]) -> Iterator[Row]:
    for line, fields in list(_records(path))[1:]:
        place = f"{path} line {line}"
        if len(fields) <= max(columns.values()):
            raise DataError(
                f"{place}: {len(fields)} fields, but the header has at least "
                f"{max(columns.values()) + 1}"
            )
        values = {column: fields[at].strip() for column, at in columns.items()}
        given = values.get("split", "")
        if given and split_named(given) is None:
            raise DataError(f"{place}: split {given!r} (allowed: {', '.join(SPLIT_NAMES)})")
        yield Row(place, (split_named(given) if given else None) or split, values)
