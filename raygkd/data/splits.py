"""Rows for training, validation and testing: split once by a seed, stratified by class."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from raygkd.data.plan import Rows
from raygkd.data.seeds import generator
from raygkd.errors import ConfigError, DataError

SPLITS = ("train", "val", "test")
"""Names of the splits; a table stores a row's split as the position in this tuple."""

TRAIN, VAL, TEST = range(3)

# of classes without names, whose number follows from it
LARGEST_LABEL = 99_999
NO_LABEL = -1
"""Label of a row without one."""

MOST_HELD_OUT = 2000
"""Images without labels that are held out for validation, at most."""

FEWEST_HELD_OUT = 4
"""Images without labels whose features can be compared."""

SPLIT_NAMES = {
    "train": TRAIN, "val": VAL, "test": TEST, "validation": VAL, "valid": VAL, "training": TRAIN,
    "eval": VAL, "dev": VAL, "testing": TEST,
}  # fmt: skip
"""Names that data sets have for splits -> position in ``SPLITS``."""


def split_named(name: str) -> str | None:
    """Return the split that a folder, file or value is named after in any case; else None."""
    position = SPLIT_NAMES.get(name.strip().lower())
    return None if position is None else SPLITS[position]


@dataclass(frozen=True, eq=False)
class Splits:
    """Row numbers of each split, ascending and disjoint.

    Attributes:
        train: rows to train on.
        val: rows that choose between settings.
        test: rows to be scored once, at the end.
        unlabelled: rows without labels to train on.
    """

    train: Rows
    val: Rows
    test: Rows
    unlabelled: Rows = field(default_factory=lambda: np.zeros(0, np.int64))


def split_rows(
    table_labels: NDArray[np.integer],
    table_splits: NDArray[np.integer],
    *,
    val_fraction: float,
    test_fraction: float,
    limit_train: int | None,
    seed: int,
) -> Splits:
    """Return the rows of each split.

    Validation and test splits that the data has are used as they are; a missing one is cut from
    the training rows, stratified by class. The test cut does not depend on ``val_fraction``, and
    neither cut depends on ``limit_train``. Rows without labels are left out of validation and test.

    Args:
        table_labels: class of each row (rows,), ``NO_LABEL`` without one.
        table_splits: position in ``SPLITS`` of each row (rows,).
        val_fraction: share of the training rows for validation, where there is no such split.
        test_fraction: share of the training rows for the test, where there is no such split;
            0 leaves the test empty.
        limit_train: train on this many rows only, stratified; None for all.
        seed: of the cuts and of the choice that ``limit_train`` makes.

    Raises:
        ConfigError: fractions or a limit are out of range.
        DataError: a class has no training row, or the validation split is empty.
    """
    is_labelled = table_labels != NO_LABEL
    rows = [np.flatnonzero(is_labelled & (table_splits == split)) for split in range(len(SPLITS))]
    unlabelled = np.flatnonzero(~is_labelled & (table_splits == TRAIN))
    train = rows[TRAIN]
    _check_fractions(val_fraction, test_fraction, has_val=len(rows[VAL]) > 0)
    for split, fraction in ((TEST, test_fraction), (VAL, val_fraction)):
        if len(rows[split]) == 0:
            count = round(fraction * len(train))
            rows[split] = choose(
                rows[TRAIN], table_labels, count, rng=generator(seed, split), spare=1
            )
            rows[TRAIN] = np.setdiff1d(rows[TRAIN], rows[split], assume_unique=True)
    if len(rows[VAL]) == 0:
        raise DataError(
            f"no image is left for validation: {len(train)} training images in "
            f"{len(np.unique(table_labels[is_labelled]))} classes are too few for --val-fraction "
            f"{val_fraction}; raise it, or add images"
        )
    if limit_train is not None:
        rows[TRAIN] = _limit(rows[TRAIN], table_labels, limit_train, seed)
    _check_classes(table_labels, rows[TRAIN])
    return Splits(train=rows[TRAIN], val=rows[VAL], test=rows[TEST], unlabelled=unlabelled)


def hold_out(
    table_splits: NDArray[np.integer], *, val_fraction: float, limit_train: int | None, seed: int
) -> Splits:
    """Return the rows of a table without labels: to train on, and for validation; none for testing.

    A validation split that the data has is used, else a share of the training rows is cut off. It
    is at most ``MOST_HELD_OUT`` rows.

    Args:
        table_splits: position in ``SPLITS`` of each row (rows,).
        val_fraction: share of the training rows for validation.
        limit_train: train on this many rows only; None for all.
        seed: of the choices.

    Raises:
        ConfigError: fractions are out of range.
        DataError: no row is left to train on, or for validation.
    """
    train, val = (np.flatnonzero(table_splits == split) for split in (TRAIN, VAL))
    _check_fractions(val_fraction, 0.0, has_val=len(val) > 0)
    mixed = generator(seed, VAL).permutation(train)
    if len(val) == 0:
        val = mixed[: min(round(val_fraction * len(train)), MOST_HELD_OUT)]
        mixed = mixed[len(val) :]
    val = np.sort(generator(seed, VAL).permutation(val)[:MOST_HELD_OUT])
    if len(val) < FEWEST_HELD_OUT or len(mixed) == 0:
        raise DataError(
            f"{len(train)} images without labels are too few: {len(val)} for validation, which "
            f"needs {FEWEST_HELD_OUT}; add images, or raise --val-fraction"
        )
    none = np.zeros(0, np.int64)
    return Splits(train=none, val=val, test=none, unlabelled=np.sort(mixed[:limit_train]))


def choose(
    rows: Rows,
    labels: NDArray[np.integer],
    count: int,
    *,
    rng: np.random.Generator,
    spare: int = 0,
    floor: int = 0,
) -> Rows:
    """Return ``count`` of ``rows``, ascending, each class with its share of them.

    Args:
        rows: row numbers to choose from.
        labels: class of each row of the table, so ``labels[rows]`` are those of ``rows``.
        count: how many; fewer come back where ``spare`` leaves fewer.
        rng: makes the choice.
        spare: rows of each class that are never chosen.
        floor: rows of each class that are always chosen.
    """
    classes, sizes = np.unique(labels[rows], return_counts=True)
    most = sizes - np.minimum(spare, sizes)
    shares = _shares(sizes, min(count, int(most.sum())), least=np.minimum(floor, most), most=most)
    chosen = [
        rng.permutation(rows[labels[rows] == label])[:share]
        for label, share in zip(classes, shares, strict=True)
    ]
    return np.sort(np.concatenate([*chosen, np.empty(0, np.int64)]))


def _shares(sizes: Rows, count: int, *, least: Rows, most: Rows) -> Rows:
    """Split ``count`` in proportion to ``sizes`` within bounds, by largest remainders."""
    ideal = count * sizes / max(int(sizes.sum()), 1)
    shares = np.clip(np.floor(ideal).astype(np.int64), least, most)
    while (missing := count - int(shares.sum())) != 0:
        step = 1 if missing > 0 else -1
        free = np.flatnonzero(shares < most if step > 0 else shares > least)
        furthest = free[np.argsort(-step * (ideal - shares)[free], kind="stable")]
        shares[furthest[: abs(missing)]] += step
    return shares


def _limit(train: Rows, labels: NDArray[np.integer], limit: int, seed: int) -> Rows:
    classes = len(np.unique(labels[train]))
    if limit < classes:
        raise ConfigError(f"--limit-train {limit}: must be at least {classes}, one image per class")
    return choose(train, labels, limit, rng=generator(seed, TRAIN), floor=1)


def _check_fractions(val_fraction: float, test_fraction: float, *, has_val: bool) -> None:
    for name, fraction in (("--val-fraction", val_fraction), ("--test-fraction", test_fraction)):
        if not 0 <= fraction < 1:
            raise ConfigError(f"{name} {fraction}: must be at least 0 and below 1")
    if val_fraction + test_fraction >= 1:
        raise ConfigError(
            f"--val-fraction {val_fraction} and --test-fraction {test_fraction} leave nothing to "
            "train on: their sum must be below 1"
        )
    if not has_val and val_fraction == 0:
        raise ConfigError(
            "--val-fraction 0: must be above 0, because the data has no validation split"
        )


def _check_classes(labels: NDArray[np.integer], train: Rows) -> None:
    untrained = np.setdiff1d(labels[labels != NO_LABEL], labels[train])
    if len(untrained):
        label = int(untrained[0])
        raise DataError(
            f"class {label} has {int(np.sum(labels == label))} images, but none for training; add "
            "some, or remove the class"
        )
