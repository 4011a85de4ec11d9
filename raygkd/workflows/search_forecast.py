"""How long the trials of a search will take: the epochs they will train, and the time."""

from __future__ import annotations

import bisect
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from raygkd.config import SearchConfig

if TYPE_CHECKING:
    from raygkd.rayrun.search_history import Trial

EPOCH_SECONDS = "epoch_seconds"
# searches that are played through, whose mean is taken
PLAYED = 20


def epochs_of_drawn(search: SearchConfig, epochs: int, spared: int = 0, groups: int = 1) -> float:
    """Return the epochs that a trial which may be stopped is expected to train.

    ASHA is played through with as many trials, one after the other, whose order is random and the
    same at every rung. More than one in ``reduction_factor`` trials continue past a rung, since the
    first to reach it are compared with few. With the several brackets of hyperband it is not known,
    and all epochs are counted.

    Args:
        search: with trials, scheduler, grace period and reduction factor.
        epochs: of a trial that is not stopped.
        spared: so many first trials are never stopped.
        groups: among which trials are compared, such as those of each student.
    """
    if search.scheduler != "asha" or search.trials <= spared:
        return float(epochs)
    draws, total = random.Random(0), 0
    for _ in range(PLAYED):
        # rung -> scores so far, ascending
        rungs: list[dict[int, list[float]]] = [{} for _ in range(groups)]
        for number in range(search.trials):
            trained = _played(
                search, epochs, draws.random(), rungs[number % groups], number < spared
            )
            total += 0 if number < spared else trained
    return total / PLAYED / (search.trials - spared)


def _played(
    search: SearchConfig,
    epochs: int,
    score: float,
    rungs: dict[int, list[float]],
    is_spared: bool,
) -> int:
    """Return the epochs that a trial trains, and note its score at the rungs that it reaches."""
    rung = search.grace_period
    while rung < epochs:
        known = rungs.setdefault(rung, [])
        # the quantile, interpolated as by numpy
        at = (len(known) - 1) * (1 - 1 / search.reduction_factor)
        low = int(at)
        cutoff = 0.0
        if known:
            high = known[min(low + 1, len(known) - 1)]
            cutoff = known[low] + (high - known[low]) * (at - low)
        bisect.insort(known, score)
        if score < cutoff and not is_spared:
            return rung
        rung *= search.reduction_factor
    return epochs


@dataclass(frozen=True, kw_only=True)
class Work:
    """The epochs that trials are expected to train.

    Attributes:
        trials: how many there are.
        epochs: of a trial that is not stopped.
        spared: so many first trials are never stopped.
        drawn: epochs that each other trial is expected to train.
        concurrent: trials at a time.
    """

    trials: int
    epochs: int
    spared: int
    drawn: float
    concurrent: int

    def expected(self) -> float:
        """Return the epochs that all trials are expected to train."""
        spared = min(self.spared, self.trials)
        return spared * self.epochs + (self.trials - spared) * self.drawn

    def left(self, trials: Mapping[int, Trial]) -> float:
        """Return the epochs that are expected to be trained yet.

        Args:
            trials: by number, of those that have begun.
        """
        return sum(self._left(number, trials.get(number)) for number in range(self.trials))

    def seconds_left(self, trials: Mapping[int, Trial]) -> float | None:
        """Return the seconds that they take, at the mean duration of an epoch; None before one.

        Args:
            trials: as for ``left``.
        """
        seconds = _measured(trials.values())
        return fmean(seconds) * self.left(trials) / self.concurrent if seconds else None

    def _left(self, number: int, trial: Trial | None) -> float:
        whole = float(self.epochs) if number < self.spared else self.drawn
        if trial is None:
            return whole
        if trial.is_over:
            return 0.0
        # one that is ahead of what was expected trains to the end
        return (whole if trial.epoch < whole else self.epochs) - trial.epoch

    def line(self, known: Iterable[Trial]) -> str:
        """Return how much there is to train, and how long it takes as far as that is measured.

        Args:
            known: trials, of whose epochs the mean duration is taken.
        """
        told = f"{self.trials} trials of at most {self.epochs} epochs, {self.concurrent} at a time"
        most, expected = self.trials * self.epochs, self.expected()
        if expected < most:
            told += (
                f"; ASHA is expected to train about {expected:.0f} of {most} epochs "
                f"({expected / most:.0%})"
            )
        seconds = _measured(known)
        if not seconds:
            return f"estimate: {told}; the time follows after the first epoch"
        mean = fmean(seconds)
        epochs_measured = "the first epoch" if len(seconds) == 1 else f"{len(seconds)} epochs"
        return (
            f"estimate: {told}; at {mean:.3g} s an epoch, measured in {epochs_measured}: about "
            f"{duration(mean * expected / self.concurrent)}"
        )


def _measured(trials: Iterable[Trial]) -> list[float]:
    """Return the seconds of each epoch that was measured."""
    epochs = (epoch for trial in trials for epoch in trial.epochs)
    return [epoch[EPOCH_SECONDS] for epoch in epochs if EPOCH_SECONDS in epoch]


def duration(seconds: float) -> str:
    """Return a duration in words, such as "40 s", "12 min" or "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
