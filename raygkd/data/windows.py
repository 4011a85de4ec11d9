"""Reading, decoding and changing a window of rows: one pure function for every runner.

A Ray task, a plain loop and a cache of decoded images get equal results, because all of them go
through ``transform_window`` and nothing in it depends on who calls it, or when.

Shapes: N rows of a window, C channels (3), H height, W width, S side of the square model input,
K most boxes of an image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from raygkd.data.boxes import ImageBoxes
from raygkd.data.plan import Rows
from raygkd.data.transforms import decode
from raygkd.errors import DataError

if TYPE_CHECKING:
    from raygkd.data.parquet import ImageTable

Arrays = dict[str, NDArray]
Targets = Sequence[ImageBoxes] | NDArray[np.int64]


class Sampler(Protocol):
    """Turns an image and what is known of it into arrays, all of one shape in every sample."""

    def blank(self) -> Arrays:
        """Return a sample that stands for no image."""

    def sample(self, image_CHW: Tensor, target: Any, *, seed: int, epoch: int, row: int) -> Arrays:
        """Return the arrays of an image uint8 (3, H, W) and its label, or its boxes."""


@dataclass(frozen=True, eq=False)
class Window:
    """A window that is ready for batching.

    Attributes:
        arrays: "image" uint8 (N, 3, S, S), "row" int64 (N,), and for classification "label" int64
            (N,), for detection "boxes" float32 (N, K, 4), "classes" int64 (N, K), "ratio" (N,).
        bad_rows: rows whose image could not be decoded (int64).
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
        table: where the images lie.
        rows: row numbers (N,).
        transform: brings each image to the model's size.
        seed: of the run.
        epoch: number of the epoch.
        skip_bad: skip unreadable images instead of stopping.
        exact: what becomes of a broken image; see ``transform_window``.

    Raises:
        DataError: a broken image without ``skip_bad``, or a window with no good one.
    """
    images = decode_rows(table, rows, skip_bad=skip_bad)
    return transform_window(
        images, rows, targets_of(table, rows), transform, seed=seed, epoch=epoch, exact=exact
    )


def targets_of(table: ImageTable, rows: Rows) -> Targets:
    """Return what is known of the images of rows: their labels, or their boxes."""
    if table.boxes is None:
        return table.labels[rows]
    return [table.boxes[row] for row in rows]


def decode_rows(table: ImageTable, rows: Rows, *, skip_bad: bool) -> Iterator[Tensor | None]:
    """Yield each row's image as uint8 (3, H, W), one decoded at a time; None for a broken one.

    Raises:
        DataError: a broken image without ``skip_bad``; names its file and row.
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
    """Transform decoded images and lay them side by side.

    Args:
        images: uint8 (3, H, W) for each row, None for a broken one; may be an iterator.
        rows: row numbers (N,).
        targets: label or ImageBoxes of each (N,).
        transform: brings each image to the model's size.
        seed: of the run.
        epoch: number of the epoch.
        exact: the window keeps N rows: the next good row after a broken one, from the end on to
            the start, takes its place (training, where all ranks need as many steps). Otherwise a
            broken row is left out (evaluation, where no image may count twice).

    Raises:
        DataError: ``exact``, and every image is broken.
    """
    # copies: what a Ray task gets is read-only, and a batch must not be
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
        taken = _next_good(is_good) if exact else np.flatnonzero(is_good)
        arrays = {name: array[taken] for name, array in arrays.items()}
    return Window(arrays, bad_rows)


def _next_good(is_good: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return, for each place of a window, the place whose image it gets."""
    good = np.flatnonzero(is_good)
    if len(good) == 0:
        raise DataError(f"all {len(is_good)} images of a window are broken: nothing to train on")
    return good[np.searchsorted(good, np.arange(len(is_good))) % len(good)]
