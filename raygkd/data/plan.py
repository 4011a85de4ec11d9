"""The rows that each rank reads in each epoch, and their order: pure functions of seeds and sizes.

A *unit* is a range of rows that storage reads together (a Parquet row group); a *window* is the set
of rows that is read, decoded and in memory at a time. The same arguments give the same plan on
every machine, so ranks need not communicate.

Where images with and without labels are mixed, the smaller set is repeated until the larger one has
been read. A row that is read again in an epoch has its number plus a multiple of the table's rows
(``rows_of_table``): it gets other random changes each time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raygkd.data.seeds import generator
from raygkd.errors import ConfigError

Rows = NDArray[np.int64]
"""Row numbers of a table."""


def steps_per_epoch(num_rows: int, world_size: int, batch_size: int) -> int:
    """Return the batches that every rank trains on in an epoch.

    Args:
        num_rows: training rows over all ranks.
        world_size: number of ranks.
        batch_size: rows of a batch on one rank.

    Raises:
        ConfigError: there are not enough rows for one batch on every rank.
    """
    steps = num_rows // (world_size * batch_size)
    if steps == 0:
        raise ConfigError(
            f"{num_rows} training images are too few for one step of {world_size} x {batch_size} "
            "(workers x images per worker); lower --batch-size or --workers"
        )
    return steps


def epoch_windows(
    rows: Rows,
    unit_starts: Rows,
    *,
    seed: int,
    epoch: int,
    rank: int,
    world_size: int,
    batch_size: int,
    window_rows: int,
) -> list[Rows]:
    """Return the windows that one rank reads in one epoch, each in the order it trains on them.

    Units, and the rows inside each, are shuffled by (seed, epoch) and concatenated. The result is
    split into ``world_size`` equal parts of whole batches, each part into windows, and each window
    is shuffled by (seed, epoch, rank, window). Rows that do not fill a batch on every rank are
    dropped; they differ from epoch to epoch.

    Args:
        rows: training rows of all ranks (rows,).
        unit_starts: first row of each unit, ascending (units,).
        seed: of the run.
        epoch: number of the epoch.
        rank: from 0 to ``world_size - 1``.
        world_size: number of ranks.
        batch_size: rows of a batch on one rank.
        window_rows: most rows of a window.

    Raises:
        ConfigError: there are not enough rows for one batch on every rank.
    """
    length = steps_per_epoch(len(rows), world_size, batch_size) * batch_size
    line = shuffled(rows, unit_starts, seed=seed, epoch=epoch)
    windows = cut_windows(line[rank * length : (rank + 1) * length], window_rows)
    return [
        generator(seed, epoch, rank, number).permutation(window)
        for number, window in enumerate(windows)
    ]


@dataclass(frozen=True, kw_only=True, eq=False)
class Mix:
    """Training rows with and without labels, and how many of each a batch takes.

    An epoch is one pass over the set that takes more batches, and the other one is repeated.

    Attributes:
        labelled, unlabelled: their rows.
        share: of a batch that has no labels, from 0 to 1.
        skips_unlabelled: read labelled rows alone, in as many steps: for a student that is trained
            on labels to be compared with one that also had the others.
        num_rows: of the table.
    """

    labelled: Rows
    unlabelled: Rows
    share: float
    num_rows: int
    skips_unlabelled: bool = False

    def parts(self, batch_size: int) -> tuple[int, int]:
        """Return how many rows of a rank's batch have a label, and how many have none.

        Raises:
            ConfigError: a batch would have no images of one of the sets.
        """
        without = round(self.share * batch_size)
        if 0 < self.share < 1 and without in (0, batch_size):
            raise ConfigError(
                f"--unlabelled-share {self.share:g}: is {without} of the {batch_size} images of a "
                "worker's batch; raise --batch-size, or choose a share nearer to 0.5"
            )
        return batch_size - without, without

    def steps_per_epoch(self, world_size: int, batch_size: int) -> int:
        """Return the batches that every rank trains on in an epoch.

        Raises:
            ConfigError: see ``parts``, or there are not enough rows for one batch on every rank.
        """
        rows = (len(self.labelled), len(self.unlabelled))
        steps = max(
            many // (world_size * part)
            for many, part in zip(rows, self.parts(batch_size), strict=True)
            if part
        )
        return steps or steps_per_epoch(sum(rows), world_size, batch_size)

    def windows(
        self,
        unit_starts: Rows,
        *,
        seed: int,
        epoch: int,
        rank: int,
        world_size: int,
        batch_size: int,
        window_rows: int,
    ) -> list[Rows]:
        """Return the windows that one rank reads in one epoch; see ``epoch_windows``.

        Every batch has the labelled rows first. A window holds whole batches, unless a batch is
        larger than ``window_rows``.
        """
        steps = self.steps_per_epoch(world_size, batch_size)
        parts = (batch_size, 0) if self.skips_unlabelled else self.parts(batch_size)
        lines = []
        for rows, part in zip((self.labelled, self.unlabelled), parts, strict=True):
            line = self._repeated(
                rows, unit_starts, world_size * steps * part, seed=seed, epoch=epoch
            )
            lines.append(line.reshape(world_size, steps, part)[rank])
        at_a_time = max(1, window_rows // batch_size)
        windows = []
        for number, start in enumerate(range(0, steps, at_a_time)):
            rng = generator(seed, epoch, rank, number)
            window = [
                rng.permutation(line[start : start + at_a_time].ravel()).reshape(-1, line.shape[1])
                for line in lines
                if line.shape[1]
            ]
            windows += cut_windows(np.concatenate(window, axis=1).ravel(), window_rows)
        return windows

    def _repeated(
        self, rows: Rows, unit_starts: Rows, count: int, *, seed: int, epoch: int
    ) -> Rows:
        """Return ``count`` rows: as many passes over ``rows`` as it takes, each in its order."""
        if count == 0:
            return np.zeros(0, np.int64)
        passes = [
            shuffled(rows, unit_starts, seed=seed, epoch=epoch, turn=turn) + turn * self.num_rows
            for turn in range(-(-count // len(rows)))
        ]
        return np.concatenate(passes)[:count]


def rows_of_table(rows: Rows, num_rows: int) -> Rows:
    """Return the numbers in the table of rows that may be read again in an epoch."""
    return rows % num_rows


def shuffled(rows: Rows, unit_starts: Rows, *, seed: int, epoch: int = 0, turn: int = 0) -> Rows:
    """Return ``rows`` with units in random order and random order inside each unit.

    A prefix of the result is a random sample from few units, and thus cheap to read. The order
    differs from one ``turn`` of an epoch to the next.
    """
    rng = generator(seed, epoch, turn) if turn else generator(seed, epoch)
    place_of_unit = rng.permutation(len(unit_starts))
    mixed = rng.permutation(rows)
    unit = np.searchsorted(unit_starts, mixed, side="right") - 1
    return mixed[np.argsort(place_of_unit[unit], kind="stable")]


def evaluation_rows(rows: Rows, rank: int, world_size: int) -> Rows:
    """Return a rank's consecutive part of ``rows``; the parts contain every row exactly once.

    Their lengths differ by at most one.
    """
    return np.array_split(rows, world_size)[rank]


def cut_windows(rows: Rows, window_rows: int) -> list[Rows]:
    """Return ``rows`` in order, in pieces of at most ``window_rows``."""
    return [rows[start : start + window_rows] for start in range(0, len(rows), window_rows)]
