"""Images in Parquet files, opened as one table whose rows can be read in any order.

A shard, as ``raygkd.data.prepare`` writes it, has the columns image (encoded bytes), label (int32),
split (string) and origin (string), in row groups of at most 256 rows of one split. For detection it
has image_id (string) and the columns of ``raygkd.data.box_columns`` instead of label. The metadata
of its schema holds a JSON object under ``b"raygkd"``: format version, data set, class names and,
for detection, the task. Its footer has the SHA-256 of its images, and the last shard's footer the
number of images in all shards, so that a folder with a shard missing is known to be incomplete.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raygkd.data import box_columns
from raygkd.data.boxes import Boxes
from raygkd.data.footers import (
    foreign_class_names,
    own_metadata,
    total_of,
)
from raygkd.data.label_values import SUPPORTED
from raygkd.data.plan import Rows
from raygkd.data.splits import LARGEST_LABEL, NO_LABEL, SPLIT_NAMES, SPLITS, TRAIN
from raygkd.errors import DataError, brief
from raygkd.storage.atomic_files import is_remote, local_path
from raygkd.storage.object_store import check_no_secret

DIGEST_KEY = b"raygkd.sha256"
COLUMNS = pa.schema(
    [("image", pa.binary()), ("label", pa.int32()), ("split", pa.string()), ("origin", pa.string())]
)
DETECTION_COLUMNS = pa.schema(
    [
        ("image", pa.binary()),
        *box_columns.FIELDS,
        ("image_id", pa.string()),
        ("split", pa.string()),
        ("origin", pa.string()),
    ]
)

EXPECTED_COLUMNS = (
    "image (binary, or a struct with binary field bytes), label (integer), and optionally split "
    "(string) and origin (string)"
)
EXPECTED_DETECTION_COLUMNS = EXPECTED_COLUMNS.replace("label (integer)", box_columns.EXPECTED)
OPENED_AT_ONCE = 16
# of attempts to reach Google's store
GCS_SECONDS = 30


@dataclass(frozen=True, eq=False)
class Units:
    """The row groups of a table, in the order of its rows; arrays of one length (units,).

    Attributes:
        file: position of the file in ``ImageTable.files``.
        row_group: number of the row group in its file.
        first: number of the unit's first row in the table, ascending.
        rows: how many rows the unit has.
    """

    file: Rows
    row_group: Rows
    first: Rows
    rows: Rows


@dataclass(frozen=True, eq=False)
class ImageTable:
    """Images in Parquet files, each with a label or with boxes.

    It holds no open file and can be sent to other processes.

    Attributes:
        path: absolute path or URI that was opened.
        dataset: name that the data set was prepared under; empty for foreign files.
        class_names: name of each class.
        labels: class of each row, int64 (rows,), -1 without one; all 0 for detection.
        splits: position in ``SPLITS`` of each row, uint8 (rows,).
        units: the row groups, the smallest pieces that can be read.
        files: paths of the files, without the URI's scheme.
        size_bytes: size of the files.
        content_hash: of the image columns.
        boxes: the objects of each row; None for classification.
        warnings: faults that were found when it was prepared, a line per kind.
    """

    path: str
    dataset: str
    class_names: tuple[str, ...]
    labels: Rows
    splits: NDArray[np.uint8]
    units: Units
    files: tuple[str, ...]
    size_bytes: int
    content_hash: str
    boxes: Boxes | None = None
    warnings: tuple[str, ...] = ()

    @property
    def task(self) -> Literal["classification", "detection"]:
        """The task of the images."""
        return "classification" if self.boxes is None else "detection"

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, split: str) -> Rows:
        """Return the row numbers of a split ("train", "val" or "test"), ascending."""
        return np.flatnonzero(self.splits == SPLITS.index(split))

    def read(self, rows: Rows) -> list[bytes]:
        """Return the encoded images of rows, in the order given; b"" for a null.

        Only the row groups that contain them are read, one at a time.

        Raises:
            DataError: a file is missing or damaged.
        """
        filesystem, _ = resolve(self.path)
        images: list[bytes] = [b""] * len(rows)
        unit_of_row = np.searchsorted(self.units.first, rows, side="right") - 1
        for file_number in np.unique(self.units.file[unit_of_row]):
            path = self.files[file_number]
            with _open_parquet(filesystem, path) as file:
                for unit in np.unique(unit_of_row[self.units.file[unit_of_row] == file_number]):
                    places = np.flatnonzero(unit_of_row == unit)
                    inside = rows[places] - self.units.first[unit]
                    column = _image_column(file, int(self.units.row_group[unit]))
                    for place, image in zip(places, column.take(pa.array(inside)).to_pylist()):
                        images[place] = image or b""
        return images

    def where(self, row: int) -> str:
        """Return "FILE row NUMBER (ORIGIN)" of a row, counted from 0, for messages."""
        unit = int(np.searchsorted(self.units.first, row, side="right")) - 1
        path = self.files[self.units.file[unit]]
        first_of_file = self.units.first[np.searchsorted(self.units.file, self.units.file[unit])]
        place = f"{path} row {row - first_of_file}"
        filesystem, _ = resolve(self.path)
        with _open_parquet(filesystem, path) as file:
            if "origin" not in file.schema_arrow.names:
                return place
            origins = file.read_row_group(int(self.units.row_group[unit]), columns=["origin"])
        return f"{place} ({origins['origin'][row - int(self.units.first[unit])]})"

    def fingerprint(self) -> str:
        """Return a hash of images, labels or boxes, splits and class names, but not of paths.

        Images that were not prepared by raygkd are identified by Parquet's metadata: sizes and, if
        present, statistics of each row group.
        """
        digest = hashlib.sha256(self.content_hash.encode())
        digest.update(json.dumps(self.class_names).encode())
        digest.update(self.labels.astype("<i8").tobytes())
        digest.update(self.splits.tobytes())
        if self.boxes is not None:
            digest.update(self.boxes.first.astype("<i8").tobytes())
            digest.update(self.boxes.every.xyxy.astype("<f4").tobytes())
            digest.update(self.boxes.every.label.astype("<i8").tobytes())
            digest.update(self.boxes.every.difficult.tobytes())
            digest.update(self.boxes.every.crowd.tobytes())
        return digest.hexdigest()


def open_table(path: str) -> ImageTable:
    """Open a folder of shards, or one Parquet file, as a table.

    Files from other sources need the columns image and label, or image, boxes and labels; without a
    column split, all rows are for training. A label that is -1 or null, or has no column, means
    that the image has none. Class names come from raygkd's metadata, or from a comma-separated list
    under the key "classes", or are "class-0" and so on. Images are not read.

    Args:
        path: a local path, or an ``s3://`` or ``gs://`` URL.

    Raises:
        DataError: the path does not exist, the folder is incomplete, a file is not Parquet or has
            wrong columns, or a label has no class name, a box is invalid or a split is unknown
            (names file and row).
    """
    filesystem, inner = resolve(path)
    infos = _find_files(filesystem, inner, path)
    with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
        parts = list(pool.map(lambda info: _read_part(filesystem, info.path), infos))
    if infos[0].path != inner:
        _check_complete(parts, path)
    labels = np.concatenate([part.labels for part in parts])
    if len(labels) == 0:
        raise DataError(f"no rows in '{path}'")
    boxes = _all_boxes(parts)
    highest = labels.max() if boxes is None else boxes.every.label.max(initial=-1)
    return ImageTable(
        path=path if "://" in path else inner,
        dataset=parts[0].dataset,
        class_names=_common_class_names(parts, int(highest)),
        labels=labels,
        splits=np.concatenate([part.splits for part in parts]),
        units=_units(parts),
        files=tuple(part.path for part in parts),
        size_bytes=sum(info.size for info in infos),
        content_hash=hashlib.sha256(
            "".join(part.image_hash for part in parts).encode()
        ).hexdigest(),
        boxes=boxes,
        warnings=parts[0].warnings or _gaps(parts, labels),
    )


def _gaps(parts: Sequence[_Part], labels: Rows) -> tuple[str, ...]:
    """Return a warning if labels without class names leave out numbers."""
    if parts[0].class_names is not None or parts[0].boxes is not None:
        return ()
    used = np.unique(labels[labels != NO_LABEL])
    if not len(used) or len(used) == used[-1] + 1:
        return ()
    missing = int(np.flatnonzero(used != np.arange(len(used)))[0])
    return (
        f"found no image of {used[-1] + 1 - len(used)} of {used[-1] + 1} classes, first of label "
        f"{missing}",
    )


def resolve(path: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """Return the file system of a path or URI, and the path inside it.

    Raises:
        ConfigError: a URI that holds a user name or password.
        DataError: the scheme is unknown, or the store does not respond.
    """
    if not is_remote(path):
        return pyarrow.fs.LocalFileSystem(), os.path.abspath(local_path(path))
    check_no_secret(path)
    scheme, _, inner = path.partition("://")
    if scheme in ("s3", "gs") and not inner.strip("/"):
        raise DataError(f"'{path}' names no bucket; write {scheme}://BUCKET/FOLDER")
    uri = path.rstrip("/")
    if scheme == "gs" and "retry_limit_seconds" not in uri:
        # its own limit is a quarter of an hour
        uri += f"{'&' if '?' in uri else '?'}retry_limit_seconds={GCS_SECONDS}"
    try:
        return pyarrow.fs.FileSystem.from_uri(uri)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"cannot reach '{path}': {_one_line(error)}") from error


@dataclass(frozen=True, eq=False)
class _Part:
    """Metadata and labels of one file."""

    path: str
    dataset: str
    class_names: tuple[str, ...] | None
    labels: Rows
    boxes: Boxes | None
    splits: NDArray[np.uint8]
    group_rows: list[int]
    image_hash: str
    total: int | None
    is_shard: bool
    warnings: tuple[str, ...]


def _find_files(
    filesystem: pyarrow.fs.FileSystem, inner: str, path: str
) -> list[pyarrow.fs.FileInfo]:
    try:
        info = filesystem.get_file_info(inner)
        if info.type == pyarrow.fs.FileType.File:
            return [info]
        found = filesystem.get_file_info(pyarrow.fs.FileSelector(inner, allow_not_found=True))
    except OSError as error:
        raise DataError(f"cannot read '{path}': {_one_line(error)}") from error
    shards = [
        file
        for file in found
        if file.type == pyarrow.fs.FileType.File
        and file.base_name.endswith(".parquet")
        and file.base_name[0] not in "._"
    ]
    if not shards:
        missing = info.type == pyarrow.fs.FileType.NotFound
        raise DataError(
            f"no {'file or folder' if missing else '.parquet files in'} '{path}'; pass a .parquet "
            "file or a folder that 'raygkd data prepare' wrote"
        )
    return sorted(shards, key=lambda file: file.base_name)


@contextmanager
def _open_parquet(filesystem: pyarrow.fs.FileSystem, path: str) -> Iterator[pq.ParquetFile]:
    """Open a file; errors inside the ``with`` block become a DataError that names it."""
    try:
        with filesystem.open_input_file(path) as stream, pq.ParquetFile(stream) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read '{path}' as Parquet: {_one_line(error)}") from error


def _read_part(filesystem: pyarrow.fs.FileSystem, path: str) -> _Part:
    with _open_parquet(filesystem, path) as file:
        schema = file.schema_arrow
        is_detection = "boxes" in schema.names and "label" not in schema.names
        _check_columns(schema, path, is_detection=is_detection)
        wanted = [*(box_columns.NAMES if is_detection else ["label"]), "split"]
        table = file.read(columns=[name for name in wanted if name in schema.names])
        footer = file.metadata.metadata or {}
        ours = own_metadata(footer, path)
        class_names = ours["classes"] if ours else foreign_class_names(footer, path)
        return _Part(
            path=path,
            dataset=ours["dataset"] if ours else "",
            class_names=tuple(class_names) if class_names is not None else None,
            labels=(
                np.zeros(len(table), dtype=np.int64)
                if is_detection
                else _labels(table, class_names, path)
            ),
            boxes=box_columns.from_columns(table, class_names, path) if is_detection else None,
            splits=_split_codes(table, path),
            group_rows=[
                file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)
            ],
            image_hash=_image_hash(file.metadata),
            total=total_of(footer, path),
            is_shard=ours is not None,
            warnings=tuple(ours.get("warnings", ())) if ours else (),
        )


def _check_columns(schema: pa.Schema, path: str, *, is_detection: bool) -> None:
    types = {field.name: field.type for field in schema}
    if len(types) < len(schema):
        twice = next(name for name in types if schema.names.count(name) > 1)
        raise DataError(f"'{path}' has the column {brief(twice)} twice; remove one of them")
    image = types.get("image")
    if image is not None and pa.types.is_struct(image):
        image = image.field("bytes").type if image.get_field_index("bytes") >= 0 else None
    split = types.get("split", pa.string())
    if pa.types.is_dictionary(split):
        split = split.value_type
    label = types.get("label", pa.null())
    is_labelled = (
        box_columns.are_box_columns(types)
        if is_detection
        else pa.types.is_integer(label) or pa.types.is_null(label)
    )
    if not (
        image is not None
        and (pa.types.is_binary(image) or pa.types.is_large_binary(image))
        and is_labelled
        and (pa.types.is_string(split) or pa.types.is_large_string(split))
    ):
        _refuse_other_labels(types.get("label"), path)
        found = ", ".join(f"{name} ({kind})" for name, kind in types.items()) or "none"
        expected = EXPECTED_DETECTION_COLUMNS if is_detection else EXPECTED_COLUMNS
        raise DataError(f"'{path}' has the columns {found}; expected {expected}")


def _refuse_other_labels(kind: pa.DataType | None, path: str) -> None:
    """Raise DataError for labels that are lists or measurements."""
    if kind is None:
        return
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        raise DataError(f"'{path}': column label has lists (multi-label data); {SUPPORTED}")
    if pa.types.is_floating(kind):
        raise DataError(f"'{path}': column label has {kind} (regression data); {SUPPORTED}")


def _labels(table: pa.Table, class_names: list[str] | None, path: str) -> Rows:
    if "label" not in table.column_names:
        return np.full(len(table), NO_LABEL, np.int64)
    labels = table["label"].cast(pa.int64()).fill_null(NO_LABEL).to_numpy()
    highest = len(class_names) - 1 if class_names is not None else LARGEST_LABEL
    wrong = np.flatnonzero((labels < NO_LABEL) | (labels > highest))
    if len(wrong):
        named = ", the named classes" if class_names is not None else ""
        allowed = f"0 to {highest}{named}"
        raise DataError(
            f"'{path}' row {wrong[0]}: label {labels[wrong[0]]} (allowed: {allowed}; -1 or null "
            "for none)"
        )
    return labels


def _split_codes(table: pa.Table, path: str) -> NDArray[np.uint8]:
    if "split" not in table.column_names:
        return np.full(len(table), TRAIN, dtype=np.uint8)
    column = table["split"].cast(pa.string())
    positions = pc.index_in(column, value_set=pa.array(SPLIT_NAMES))
    if positions.null_count:
        row = pc.index(positions.is_null(), True).as_py()
        raise DataError(
            f"'{path}' row {row}: split {column[row].as_py()!r} (allowed: {', '.join(SPLIT_NAMES)})"
        )
    return np.array(list(SPLIT_NAMES.values()), dtype=np.uint8)[positions.to_numpy()]


def _image_hash(metadata: pq.FileMetaData) -> str:
    """Return the hash of a shard's images, or of the image metadata in another file's footer."""
    footer = metadata.metadata or {}
    if DIGEST_KEY in footer:
        return footer[DIGEST_KEY].decode()
    facts = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema.split(".")[0] == "image":
                facts += [group.num_rows, column.total_uncompressed_size]
                if column.statistics is not None:
                    facts += [column.statistics.min, column.statistics.max]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _check_complete(parts: list[_Part], path: str) -> None:
    """Raise DataError if the shards do not have the number of images stated in the last one."""
    rows = sum(len(part.labels) for part in parts)
    totals = [part.total for part in parts if part.total is not None]
    if any(part.is_shard for part in parts) and totals != [rows]:
        expected = " + ".join(map(str, totals)) or "an unknown number (the last shard is missing)"
        raise DataError(
            f"'{path}' is incomplete: its shards contain {rows} images instead of {expected}; "
            "copy or prepare it again"
        )


def _all_boxes(parts: list[_Part]) -> Boxes | None:
    boxes = [part.boxes for part in parts if part.boxes is not None]
    if boxes and len(boxes) < len(parts):
        with_boxes, without = (
            next(part.path for part in parts if (part.boxes is None) == is_without)
            for is_without in (False, True)
        )
        raise DataError(f"'{with_boxes}' has boxes and '{without}' has labels; keep one kind")
    if not boxes:
        return None
    counts = np.concatenate([np.diff(one.first) for one in boxes])
    first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Boxes(first, Boxes.of([one.every for one in boxes]).every)


def _common_class_names(parts: list[_Part], highest_label: int) -> tuple[str, ...]:
    for part in parts:
        if part.class_names != parts[0].class_names:
            raise DataError(
                f"'{part.path}' and '{parts[0].path}' have different class names; prepare them "
                "again, together"
            )
    return parts[0].class_names or tuple(f"class-{label}" for label in range(highest_label + 1))


def _units(parts: list[_Part]) -> Units:
    rows = np.array([rows for part in parts for rows in part.group_rows], dtype=np.int64)
    return Units(
        file=np.repeat(np.arange(len(parts)), [len(part.group_rows) for part in parts]),
        row_group=np.concatenate([np.arange(len(part.group_rows)) for part in parts]),
        first=np.cumsum(rows) - rows,
        rows=rows,
    )


def _image_column(file: pq.ParquetFile, row_group: int) -> pa.ChunkedArray:
    column = file.read_row_group(row_group, columns=["image"])["image"]
    return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
