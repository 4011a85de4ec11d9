"""The history of a search in a journal, from which an interrupted search is resumed.

When the journal is read again, searcher and scheduler receive the same events in the same order, so
their state is restored: an interruption does not change what they draw and stop next.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray.tune.result import TRAINING_ITERATION
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from raygkd.engine.patience import STOPPED_EARLY
from raygkd.errors import DataError
from raygkd.metrics.ranking import WORST, higher_is_better, rank
from raygkd.rayrun.worker import METRIC, METRICS
from raygkd.storage.atomic_files import Place, make_folder
from raygkd.storage.journal import open_journal, read_entries

JOURNAL = "trials.jsonl"
# a line of it: what a trial has been given, or the metrics of one of its epochs
EVENT = {"trial": int, "params?": dict[str, Any], "metrics?": METRICS}
# how much of a score a loss can cost where trials are ordered
TIE_BREAK = 1e-6
_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Trial:
    """One trial.

    Attributes:
        number: from 0, in the order of the draws.
        params: the searched settings.
        epochs: the metrics of each.
        status: "running", "finished", "stopped" (by the scheduler), "diverged" or "failed".
        error: one line, if it failed.
        is_mistake: it failed because of a user error.
    """

    number: int
    params: dict[str, Any]
    epochs: list[dict[str, float]] = field(default_factory=list)
    status: str = "running"
    error: str | None = None
    is_mistake: bool = False

    @property
    def epoch(self) -> int:
        """Number of epochs done."""
        return int(self.epochs[-1]["epoch"]) if self.epochs else 0

    @property
    def scores(self) -> dict[int, float]:
        """Epoch -> validation score."""
        return {int(epoch["epoch"]): epoch[METRIC] for epoch in self.epochs}

    @property
    def is_over(self) -> bool:
        """Whether the trial is over."""
        return self.status != "running"

    @property
    def name(self) -> str:
        """The trial's id for schedulers and searchers."""
        return str(self.number)


class SearchObserver:
    """Receives the events of a search's trials, in the driver. Override the methods needed.

    The interrupted process may already have reported the same events.
    """

    def known(self, trial: Trial) -> None:
        """Report a trial that an earlier process started."""

    def started(self, trial: Trial) -> None:
        """Report that a trial starts or restarts."""

    def reported(self, trial: Trial, metrics: Mapping[str, float]) -> None:
        """Report the metrics of an epoch."""

    def ended(self, trial: Trial) -> None:
        """Report that a trial is over."""

    def lost(self, trial: Trial, failures: int) -> None:
        """Report that a trial lost a process and will resume from its checkpoint."""


class History:
    """The trials of a search, with its searcher and scheduler.

    Args:
        path: of the journal; an existing one is resumed.
        searcher: draws the settings.
        scheduler: stops trials early.
        trials: how many there will be.
        epochs: of a trial that is not stopped.
        seed: of what the scheduler draws.
        observer: receives the events, before they are written to the journal.
        score: what trials are ranked by, as in ``--score``. Searcher and scheduler get its rank,
            which is larger for a better trial.
        spared: so many first trials are never stopped early.
        is_late: tells whether the time is over, so that no trial begins or continues. A resumed
            search continues the trials that this has stopped.

    Attributes:
        trials: those that have started, by number.

    Raises:
        DataError: the journal is damaged.
    """

    def __init__(
        self,
        path: Place,
        searcher: Searcher,
        scheduler: TrialScheduler,
        *,
        trials: int,
        epochs: int,
        seed: int,
        observer: SearchObserver,
        score: str = "auto",
        spared: int = 0,
        is_late: Callable[[], bool] = lambda: False,
    ):
        self.trials: list[Trial] = []
        self._path, self._journal = path, open_journal(path)
        self._searcher, self._scheduler = searcher, scheduler
        self._number_of_trials, self._epochs, self._seed = trials, epochs, seed
        self._observer, self._score, self._spared = observer, score, spared
        self._is_late = is_late
        make_folder(path.parent)
        self._replay()
        for trial in self.trials:
            observer.known(trial)
        self._waiting = [trial for trial in self.trials if not trial.is_over]

    @property
    def is_late(self) -> bool:
        """Whether the time is over and a trial has a score, so that no other one begins."""
        return self._is_late() and any(trial.epochs for trial in self.trials)

    @property
    def left(self) -> int:
        """Number of trials that ``begin`` will return, if there is time."""
        return len(self._waiting) + self._number_of_trials - len(self.trials)

    def begin(self) -> Trial:
        """Return the next trial: an interrupted one, or a new one."""
        if self._waiting:
            trial = self._waiting.pop(0)
            self._observer.started(trial)
            return trial
        trial = self._draw()
        self._observer.started(trial)
        self._write(trial, params=trial.params)
        return trial

    def report(self, trial: Trial, metrics: Mapping[str, float]) -> None:
        """Record the metrics of an epoch, unless they are known; the trial may be over then."""
        if trial.is_over or metrics["epoch"] <= trial.epoch:
            return
        values = dict(metrics)
        self._decide(trial, values)
        if not trial.is_over and self._is_late():
            trial.status = "stopped"
        self._observer.reported(trial, values)
        if trial.is_over:
            self._observer.ended(trial)
        self._write(trial, metrics=values)

    def fail(self, trial: Trial, error: str, *, is_mistake: bool) -> None:
        """Record that a trial has failed."""
        trial.status, trial.error, trial.is_mistake = "failed", error, is_mistake
        self._tell_end(trial)
        self._observer.ended(trial)
        self._write(trial, error=error, is_mistake=is_mistake)

    def lose(self, trial: Trial, failures: int) -> None:
        """Record that a trial lost its process for the n-th time and restarts."""
        self._observer.lost(trial, failures)

    def _draw(self) -> Trial:
        number = len(self.trials)
        params = self._searcher.suggest(str(number))
        assert isinstance(params, dict)
        # as it will be read from the journal
        trial = Trial(number=number, params=json.loads(json.dumps(params, default=_plain)))
        self.trials.append(trial)
        with _numpy_seed(self._seed, number):
            self._scheduler.on_trial_add(None, _handle(trial))
        return trial

    def _decide(self, trial: Trial, metrics: dict[str, float]) -> None:
        trial.epochs.append(metrics)
        ranked = _ranked(metrics, self._score)
        decision = self._scheduler.on_trial_result(None, _handle(trial), _standing(ranked))
        if metrics.get("diverged"):
            trial.status = "diverged"
        elif trial.epoch >= self._epochs or metrics.get(STOPPED_EARLY):
            trial.status = "finished"
        elif decision == TrialScheduler.STOP and trial.number >= self._spared:
            trial.status = "stopped"
        if trial.is_over:
            self._tell_end(trial)
        else:
            # Optuna counts reports by Tune's own entry
            self._searcher.on_trial_result(trial.name, {**ranked, TRAINING_ITERATION: trial.epoch})

    def _tell_end(self, trial: Trial) -> None:
        if trial.epochs:
            last = _ranked(trial.epochs[-1], self._score)
            self._scheduler.on_trial_complete(None, _handle(trial), _standing(last))
            self._searcher.on_trial_complete(trial.name, last)
        else:
            self._searcher.on_trial_complete(trial.name, error=True)

    def _write(self, trial: Trial, **event: Any) -> None:
        self._journal.append(json.dumps({"trial": trial.number, **event}))

    def _replay(self) -> None:
        """Restore the state from the journal."""
        # a trial that failed is tried again, from its checkpoint
        for number, event in enumerate(read_entries(self._path, EVENT), start=1):
            try:
                self._apply(event)
            except (ValueError, KeyError, IndexError) as error:
                raise DataError(f"{self._path} line {number} is damaged") from error

    def _apply(self, event: dict[str, Any]) -> None:
        if "params" in event:
            trial = self._draw()
            if trial.params != event["params"]:
                _log.warning(
                    "trial %d: the settings drawn now are %s, but were %s in the earlier process, "
                    "because a library has another version; the trial keeps its earlier settings",
                    trial.number,
                    trial.params,
                    event["params"],
                )
                trial.params = event["params"]
        elif "metrics" in event:
            self._decide(self.trials[event["trial"]], event["metrics"])


def read_epochs(path: Place) -> dict[int, list[dict[str, float]]]:
    """Return number -> metrics of each epoch, of the trials in a search's journal.

    Raises:
        DataError: the journal is damaged.
    """
    found: dict[int, list[dict[str, float]]] = {}
    for event in read_entries(path, EVENT):
        if "metrics" in event:
            found.setdefault(event["trial"], []).append(event["metrics"])
    return found


def _handle(trial: Trial) -> Any:
    """Return a stand-in for Tune's trial, for a scheduler."""
    return SimpleNamespace(trial_id=trial.name, params=trial.params)


def _ranked(metrics: Mapping[str, float], score: str) -> dict[str, float]:
    """Return metrics with the rank in the place of the score, see ``rank``."""
    # 0, the score of a trial that diverged, is not a bad one where lower is better
    is_worst = metrics.get("diverged") and not higher_is_better(score)
    return {**metrics, METRIC: WORST if is_worst else rank(metrics[METRIC], score)}


def _standing(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return metrics by which a scheduler orders trials: of equal scores the lower loss is ahead.

    After few steps many models have the same score, that of chance, and ASHA lets all tied trials
    of a rung continue. The loss changes a score by less than one example in a million does.
    """
    loss = metrics.get("val_loss", metrics.get("loss_task", 0.0))
    share = loss / (1.0 + loss) if 0.0 <= loss < math.inf else 1.0
    return {**metrics, METRIC: metrics[METRIC] - TIE_BREAK * share}


def _plain(value: Any) -> Any:
    """Return a numpy number as a Python number."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} is not a setting")


@contextlib.contextmanager
def _numpy_seed(seed: int, number: int) -> Iterator[None]:
    """Seed numpy's global generator, which draws a trial's bracket, by the trial alone."""
    before = np.random.get_state()
    np.random.seed([seed, number])
    try:
        yield
    finally:
        np.random.set_state(before)
