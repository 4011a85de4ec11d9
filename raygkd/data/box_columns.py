"""Boxes as columns of a Parquet table, with a list for each image.

The columns are boxes (for each box a list of its sides x0, y0, x1, y1, in pixels of the upright
image), labels, and optionally difficult and crowd.

Shapes: M boxes of all rows, 4 sides of a box.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raygkd.data.boxes import Boxes, ImageBoxes
from raygkd.data.splits import LARGEST_LABEL
from raygkd.errors import DataError

FLAGS = ("difficult", "crowd")
FIELDS = [
    pa.field("boxes", pa.list_(pa.list_(pa.float32()))),
    pa.field("labels", pa.list_(pa.int32())),
    *(pa.field(name, pa.list_(pa.bool_())) for name in FLAGS),
]
NAMES = [field.name for field in FIELDS]
EXPECTED = (
    "boxes (lists of lists of four numbers) and labels (lists of integers), and optionally "
    "difficult and crowd (lists of booleans)"
)


def to_columns(boxes: ImageBoxes) -> dict[str, list[Any]]:
    """Return the values of the columns for an image."""
    return {
        "boxes": boxes.xyxy.tolist(),
        "labels": boxes.label.tolist(),
        "difficult": boxes.difficult.tolist(),
        "crowd": boxes.crowd.tolist(),
    }


def are_box_columns(types: dict[str, pa.DataType]) -> bool:
    """Return whether ``from_columns`` can read columns of these types."""
    sides, label = _inner(_inner(types.get("boxes"))), _inner(types.get("labels"))
    return (
        sides is not None
        and (pa.types.is_floating(sides) or pa.types.is_integer(sides))
        and label is not None
        and pa.types.is_integer(label)
        and all(_inner(types[name]) == pa.bool_() for name in FLAGS if name in types)
    )


def from_columns(table: pa.Table, class_names: list[str] | None, path: str) -> Boxes:
    """Return the boxes of all rows.

    Args:
        table: table with the columns.
        class_names: name of each label; None if labels have no names.
        path: path of the file, for error messages.

    Raises:
        DataError: a row's lists are missing or have different lengths, a box does not have four
            finite sides or has no area, or a label is not a class; names file and row.
    """
    counts = _counts(table["boxes"], path)
    first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    for name in ("labels", *FLAGS):
        if name in table.column_names:
            lengths = _counts(table[name], path, name)
            for row in np.flatnonzero(lengths != counts)[:1]:
                raise DataError(
                    f"'{path}' row {row}: {counts[row]} boxes but {lengths[row]} {name}; every box "
                    "needs one"
                )
    every = ImageBoxes(
        xyxy=_sides(table["boxes"], first, path),
        label=_labels(table["labels"], class_names, first, path),
        **{name: _flags(table, name, first, path) for name in FLAGS},
    )
    return Boxes(first, every)


def _inner(kind: pa.DataType | None) -> pa.DataType | None:
    """Return the item type of a list type; None if the type is not a list."""
    if kind is None:
        return None
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return kind.value_type if is_list or pa.types.is_fixed_size_list(kind) else None


def _counts(column: pa.ChunkedArray, path: str, name: str = "boxes") -> NDArray[np.int64]:
    """Return the length of each row's list."""
    if column.null_count:
        row = pc.index(column.is_null(), True).as_py()
        raise DataError(
            f"'{path}' row {row}: no list of {name}; use an empty list for images without objects"
        )
    return pc.list_value_length(column).to_numpy().astype(np.int64)


def _sides(column: pa.ChunkedArray, first: NDArray[np.int64], path: str) -> NDArray[np.float32]:
    """Return the sides of all boxes (M, 4)."""
    boxes = pc.list_flatten(column)
    lengths = pc.fill_null(pc.list_value_length(boxes), -1).to_numpy()
    _refuse(lengths != 4, boxes, first, path, " must be four numbers x0, y0, x1, y1")
    sides = pc.list_flatten(boxes).cast(pa.float32(), safe=False).to_numpy()
    xyxy_M4 = sides.reshape(-1, 4)
    _refuse(~np.isfinite(xyxy_M4).all(axis=1), boxes, first, path, " must have finite sides")
    has_area = (xyxy_M4[:, 2:] > xyxy_M4[:, :2]).all(axis=1)
    _refuse(~has_area, boxes, first, path, " has no area: x0 must be below x1, and y0 below y1")
    return xyxy_M4


def _labels(
    column: pa.ChunkedArray,
    class_names: list[str] | None,
    first: NDArray[np.int64],
    path: str,
) -> NDArray[np.int64]:
    labels = pc.list_flatten(column)
    highest = len(class_names) - 1 if class_names is not None else LARGEST_LABEL
    numbers = pc.fill_null(labels.cast(pa.int64()), -1).to_numpy()
    named = ", the named classes" if class_names is not None else ""
    allowed = f"0 to {highest}{named}"
    wrong = (numbers < 0) | (numbers > highest)
    _refuse(wrong, labels, first, path, f" (allowed: {allowed})", "label ")
    return numbers


def _flags(table: pa.Table, name: str, first: NDArray[np.int64], path: str) -> NDArray[np.bool_]:
    if name not in table.column_names:
        return np.zeros(first[-1], bool)
    flags = pc.list_flatten(table[name])
    _refuse(flags.is_null().to_numpy(), flags, first, path, " must be true or false", f"{name} ")
    return flags.to_numpy()


def _refuse(
    wrong: NDArray[np.bool_],
    values: pa.ChunkedArray,
    first: NDArray[np.int64],
    path: str,
    rule: str,
    name: str = "",
) -> None:
    """Raise DataError for the first invalid value of a box, if there is one."""
    for box in np.flatnonzero(wrong)[:1]:
        row = int(np.searchsorted(first, box, side="right")) - 1
        value = values[int(box)].as_py()
        raise DataError(f"'{path}' row {row} box {box - first[row]}: {name}{value}{rule}")
