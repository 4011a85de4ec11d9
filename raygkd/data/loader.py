"""Batches from a table in plain torch, without Ray.

Shapes: B batch, C channels (3), S side of the square model input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from raygkd.data import plan
from raygkd.data.boxes import Boxes
from raygkd.data.plan import Rows
from raygkd.data.splits import Splits
from raygkd.data.windows import Arrays, Sampler, load_window

if TYPE_CHECKING:
    from raygkd.data.parquet import ImageTable

WINDOW_ROWS = 1024


def rebatch(windows: Iterable[Arrays], batch_size: int, *, drop_last: bool) -> Iterator[Arrays]:
    """Yield the rows of the windows, in order, in batches of ``batch_size`` rows.

    Args:
        windows: arrays with the same names, whose first axis is rows.
        batch_size: rows per batch.
        drop_last: drop the remaining rows that do not fill a batch; otherwise, yield them last.
    """
    remaining: Arrays = {}
    for window in windows:
        arrays = window
        if remaining:
            arrays = {name: np.concatenate([remaining[name], window[name]]) for name in window}
        rows = len(next(iter(arrays.values())))
        end = rows - rows % batch_size
        for start in range(0, end, batch_size):
            yield {name: array[start : start + batch_size] for name, array in arrays.items()}
        remaining = {name: array[end:] for name, array in arrays.items()} if end < rows else {}
    if remaining and not drop_last:
        yield remaining


class PlainStream:
    """One rank's images, read and decoded in this process, a window at a time.

    Args:
        table: table of the images.
        splits: rows for training, validation and testing.
        train_transform: transform of training images.
        eval_transform: transform of the others.
        batch_size: rows per batch on one rank.
        seed: seed of the order and the augmentation.
        rank: from 0 to ``world_size - 1``.
        world_size: number of ranks.
        window_rows: maximum number of rows that are read and decoded at a time.
        skip_bad: skip and count unreadable images instead of stopping.

    Raises:
        ConfigError: there are not enough rows for one batch on every rank.
    """

    def __init__(
        self,
        table: ImageTable,
        splits: Splits,
        train_transform: Sampler,
        eval_transform: Sampler,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        window_rows: int = WINDOW_ROWS,
        skip_bad: bool = False,
    ):
        self.table = table
        self.splits = splits
        self.train_transform = train_transform
        self.eval_transform = eval_transform
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.window_rows = window_rows
        self.skip_bad = skip_bad
        self.steps_per_epoch = plan.steps_per_epoch(len(splits.train), world_size, batch_size)
        self._bad_rows: set[int] = set()

    @property
    def bad_images(self) -> int:
        """How many different unreadable images this rank has skipped so far."""
        return len(self._bad_rows)

    @property
    def boxes(self) -> Boxes | None:
        """The boxes of every image of the table, for detection; otherwise None."""
        return self.table.boxes

    def train_batches(self, epoch: int) -> Iterator[dict[str, Tensor]]:
        """Yield ``steps_per_epoch`` batches of this rank.

        A batch has "image" uint8 (B, 3, S, S), "label" int64 (B,) and "row" int64 (B,).

        Raises:
            DataError: an image is unreadable and ``skip_bad`` is off.
        """
        windows = plan.epoch_windows(
            self.splits.train,
            self.table.units.first,
            seed=self.seed,
            epoch=epoch,
            rank=self.rank,
            world_size=self.world_size,
            batch_size=self.batch_size,
            window_rows=self.window_rows,
        )
        return self._batches(windows, self.train_transform, epoch=epoch, exact=True)

    def eval_batches(self, split: str) -> Iterator[dict[str, Tensor]]:
        """Yield this rank's share of a split, every image once; the last batch may be short.

        Args:
            split: "train", "val" or "test".

        Raises:
            DataError: an image is unreadable and ``skip_bad`` is off.
        """
        rows = plan.evaluation_rows(getattr(self.splits, split), self.rank, self.world_size)
        windows = plan.cut_windows(rows, self.window_rows)
        return self._batches(windows, self.eval_transform, epoch=0, exact=False)

    def close(self) -> None:
        """Do nothing: this stream does not prefetch."""

    def _batches(
        self, windows: list[Rows], transform: Sampler, *, epoch: int, exact: bool
    ) -> Iterator[dict[str, Tensor]]:
        loaded = (self._load(rows, transform, epoch, exact) for rows in windows)
        for batch in rebatch(loaded, self.batch_size, drop_last=False):
            yield {name: torch.from_numpy(array) for name, array in batch.items()}

    def _load(self, rows: Rows, transform: Sampler, epoch: int, exact: bool) -> Arrays:
        window = load_window(
            self.table,
            rows,
            transform,
            seed=self.seed,
            epoch=epoch,
            skip_bad=self.skip_bad,
            exact=exact,
        )
        self._bad_rows.update(window.bad_rows.tolist())
        return window.arrays
