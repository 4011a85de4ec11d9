"""Code shared by a search and its repeats: concurrent trials, and how they are logged."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from raygkd.config import to_yaml, with_settings
from raygkd.errors import RunFailed, UserError
from raygkd.metrics.ranking import rank
from raygkd.rayrun.search_history import SearchObserver, Trial
from raygkd.rayrun.tune_search import TrialResult
from raygkd.rayrun.worker import METRIC, trial_folder
from raygkd.report.console import Advance
from raygkd.workflows.preflight import require_room
from raygkd.workflows.run_tags import run_tags
from raygkd.workflows.session import Session

FIRST_STEP = "first_step_seconds"
_log = logging.getLogger(__name__)


def at_once(session: Session, trials: int) -> int:
    """Return how many trials run at the same time."""
    fitting = require_room(session.config, session.nodes, session.data_cpus)
    wanted = session.config.search.max_concurrent or fitting
    if session.config.cluster.wait_minutes:
        # the cluster grows with what waits for room
        return min(wanted, trials)
    return min(fitting, trials, wanted)


def require_a_score(trials: Collection[TrialResult], role: str) -> None:
    """Raise an error with the reasons if no trial has a score.

    Args:
        trials: all of them.
        role: name of a trial, for the message.

    Raises:
        UserError: none has, because of a user error.
        RunFailed: none has, for another reason.
    """
    if any(trial.status in ("finished", "stopped") for trial in trials):
        return
    reasons = "; ".join(sorted({trial.error or trial.status for trial in trials}))
    mistake = all(trial.is_mistake for trial in trials)
    raise (UserError if mistake else RunFailed)(f"no {role} has a score: {reasons}")


def trial_key(number: int) -> str:
    """Return the key of a trial's MLflow run."""
    return f"trial-{number:04d}"


class SearchProgress(SearchObserver):
    """Logs trials to MLflow, as children of the search, and shows their progress.

    Args:
        session: the open run.
        advance: shows progress.
        number_of_trials: how many there will be.
    """

    role = "trial"

    def __init__(self, session: Session, advance: Advance, number_of_trials: int):
        self._session = session
        self._advance = advance
        self._number_of_trials = number_of_trials
        self._trials: dict[int, Trial] = {}
        self.first_steps: list[float] = []
        advance(0, number_of_trials)

    def key(self, trial: Trial) -> str:
        """Return the tracker's key of a trial."""
        return trial_key(trial.number)

    def name(self, trial: Trial) -> str:
        """Return the name of a trial in MLflow's UI."""
        return f"trial {trial.number}"

    def parent(self, trial: Trial) -> str:
        """Return the tracker's key of the parent of a trial's run."""
        return "search"

    def params(self, trial: Trial) -> Mapping[str, Any]:
        """Return the settings of a trial for MLflow."""
        return trial.params

    def running(self) -> list[str]:
        """Return the folder names of the active trials."""
        running = [trial for trial in self._trials.values() if not trial.is_over]
        return [trial_folder(self._session.folder, trial.number).name for trial in running]

    def known(self, trial: Trial) -> None:
        """Count a trial of an earlier process; it is not active until it is restarted."""
        if trial.is_over:
            self._trials[trial.number] = trial
        self._show()

    def started(self, trial: Trial) -> None:
        """Open the trial's MLflow run."""
        self._trials[trial.number] = trial
        self._session.tracker.start(
            self.key(trial),
            self.name(trial),
            parent=self.parent(trial),
            params=self.params(trial),
            tags=run_tags(self._session, self.role),
            texts={"config.yaml": to_yaml(with_settings(self._session.config, trial.params))},
        )
        self._show()

    def reported(self, trial: Trial, metrics: Mapping[str, float]) -> None:
        """Log an epoch."""
        self.first_steps += [metrics[FIRST_STEP]] if FIRST_STEP in metrics else []
        self._session.tracker.metrics(self.key(trial), metrics, step=int(metrics["epoch"]))
        self._show()

    def ended(self, trial: Trial) -> None:
        """Close the trial's MLflow run."""
        status = "FAILED" if trial.status == "failed" else "FINISHED"
        self._session.tracker.end(self.key(trial), status)
        self._show()

    def lost(self, trial: Trial, failures: int) -> None:
        """Warn that a trial is restarted after a failure."""
        _log.warning(
            "%s lost its process (restart %d of at most %d); it resumes after epoch %d",
            self.name(trial),
            failures,
            self._session.config.cluster.max_failures,
            trial.epoch,
        )

    def _show(self) -> None:
        trials = self._trials.values()
        over = sum(trial.is_over for trial in trials)
        epochs = sum(trial.epoch for trial in trials)
        scores = [
            epoch[METRIC] for trial in trials for epoch in trial.epochs if not epoch.get("diverged")
        ]
        score = self._session.config.data.score
        best = max(scores, key=lambda value: rank(value, score), default=0.0)
        note = f"{len(trials) - over} running, {epochs} epochs, best val {best:.4f}"
        self._advance(over, self._number_of_trials, note)
