"""The rows that each rank reads in each epoch, and their order: pure functions of seeds and sizes.

A *unit* is a range of rows that storage reads together (a Parquet row group); a *window* is the set
of rows that is read, decoded and in memory at a time. The same arguments give the same plan on
every machine, so ranks need not communicate.
"""

from __future__ import annotations

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
            "(workers x images of each): lower --batch-size or --workers"
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


def shuffled(rows: Rows, unit_starts: Rows, *, seed: int, epoch: int = 0) -> Rows:
    """Return ``rows`` with units in random order and random order inside each unit.

    A prefix of the result is a random sample from few units, and thus cheap to read.
    """
    rng = generator(seed, epoch)
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
