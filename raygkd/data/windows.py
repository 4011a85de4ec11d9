"""Reading, decoding and transforming a window of rows: one pure function for every runner.

Ray tasks, a plain loop and a cache of decoded images give the same results, because all of them
call ``transform_window``, which depends on its arguments alone.

Shapes: N rows of a window, C channels (3), H height, W width, S side of the square model input,
K maximum number of boxes in an image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from raygkd.data.boxes import ImageBoxes
from raygkd.data.decoding import decode
from raygkd.data.plan import Rows, rows_of_table
from raygkd.errors import DataError

if TYPE_CHECKING:
    from raygkd.data.parquet import ImageTable

Arrays = dict[str, NDArray]
Targets = Sequence[ImageBoxes] | NDArray[np.int64]


class Sampler(Protocol):
    """Converts an image and its label or boxes to arrays of the same shapes for all samples."""

    def blank(self) -> Arrays:
        """Return an empty sample, with the shapes of all samples."""

    def sample(self, image_CHW: Tensor, target: Any, *, seed: int, epoch: int, row: int) -> Arrays:
        """Return the arrays of an image uint8 (3, H, W) and its label, or its boxes."""


@dataclass(frozen=True, eq=False)
class Window:
    """A transformed window, ready for batching.

    Attributes:
        arrays: "image" uint8 (N, 3, S, S), "row" int64 (N,), and for classification "label" int64
            (N,), for detection "boxes" float32 (N, K, 4), "classes" int64 (N, K), "ratio" (N,).
        bad_rows: rows whose images cannot be decoded, int64.
    """

    arrays: Arrays
    bad_rows: Rows


def load_window(
    table: ImageTable,
    rows: Rows,
    transform: Sampler,
    *,
    seed: int,
    epoch: int,
    skip_bad: bool,
    exact: bool,
) -> Window:
    """Read, decode and transform rows, in the order given.

    Args:
        table: table of the images.
        rows: row numbers (N,), with a multiple of the table's rows where one is read again.
        transform: resizes each image to the model's input.
        seed: seed of the run.
        epoch: number of the epoch.
        skip_bad: skip unreadable images instead of stopping.
        exact: how unreadable images are replaced, see ``transform_window``.

    Raises:
        DataError: an image is unreadable and ``skip_bad`` is off, or all images are unreadable.
    """
    of_table = rows_of_table(rows, len(table))
    images = decode_rows(table, of_table, skip_bad=skip_bad)
    return transform_window(
        images, rows, targets_of(table, of_table), transform, seed=seed, epoch=epoch, exact=exact
    )


def targets_of(table: ImageTable, rows: Rows) -> Targets:
    """Return the labels or boxes of the images of rows."""
    if table.boxes is None:
        return table.labels[rows]
    return [table.boxes[row] for row in rows]


def decode_rows(table: ImageTable, rows: Rows, *, skip_bad: bool) -> Iterator[Tensor | None]:
    """Yield each row's image as uint8 (3, H, W), decoded one by one; None for unreadable images.

    Raises:
        DataError: an image is unreadable and ``skip_bad`` is off; names its file and row.
    """
    for row, encoded in zip(rows, table.read(rows), strict=True):
        try:
            yield decode(encoded)
        except ValueError as error:
            if not skip_bad:
                raise DataError(
                    f"{table.where(int(row))}: {error}; replace it or pass --skip-bad"
                ) from error
            yield None


def transform_window(
    images: Iterable[Tensor | None],
    rows: Rows,
    targets: Targets,
    transform: Sampler,
    *,
    seed: int,
    epoch: int,
    exact: bool,
) -> Window:
    """Transform decoded images and stack them.

    Args:
        images: uint8 (3, H, W) for each row, None if unreadable; may be an iterator.
        rows: row numbers (N,).
        targets: label or ImageBoxes of each row (N,).
        transform: resizes each image to the model's input.
        seed: seed of the run.
        epoch: number of the epoch.
        exact: keep N rows: an unreadable row is replaced by the next readable one, wrapping around
            at the end (training, where all ranks need the same number of steps). Otherwise,
            unreadable rows are omitted (evaluation, where no image may count twice).

    Raises:
        DataError: ``exact`` is set and every image is unreadable.
    """
    # copies, because arguments of a Ray task are read-only and batches must not be
    arrays: Arrays = {"row": np.array(rows)}
    for name, value in transform.blank().items():
        arrays[name] = np.empty((len(rows), *value.shape), value.dtype)
    is_good = np.zeros(len(rows), dtype=bool)
    for index, (row, image_CHW) in enumerate(zip(rows.tolist(), images, strict=True)):
        if image_CHW is not None:
            sample = transform.sample(image_CHW, targets[index], seed=seed, epoch=epoch, row=row)
            for name, value in sample.items():
                arrays[name][index] = value
            is_good[index] = True
    bad_rows = rows[~is_good]
    if len(bad_rows):
        kept = _next_good(is_good) if exact else np.flatnonzero(is_good)
        arrays = {name: array[kept] for name, array in arrays.items()}
    return Window(arrays, bad_rows)


def _next_good(is_good: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the position of the next readable image for each position of a window."""
    good = np.flatnonzero(is_good)
    if len(good) == 0:
        raise DataError(
            f"all {len(is_good)} images of a window are unreadable: nothing to train on"
        )
    return good[np.searchsorted(good, np.arange(len(is_good))) % len(good)]
