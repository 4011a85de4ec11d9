"""Code shared by a search and its repeats: concurrent trials, and how they are logged."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from raygkd.assembly.models import student_file
from raygkd.config import to_yaml, with_settings
from raygkd.engine import read_checkpoint
from raygkd.errors import RunFailed, UserError
from raygkd.metrics.ranking import rank
from raygkd.models import ModelFile
from raygkd.rayrun.search_history import SearchObserver, Trial
from raygkd.rayrun.tune_search import TrialResult
from raygkd.rayrun.worker import METRIC, trial_folder
from raygkd.report.console import Advance
from raygkd.workflows.preflight import require_room
from raygkd.workflows.run_tags import run_tags
from raygkd.workflows.search_forecast import EPOCH_SECONDS, Work, duration
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
        work: what there is to train.
    """

    role = "trial"

    def __init__(self, session: Session, advance: Advance, work: Work):
        self._session = session
        self._advance = advance
        self._work = work
        self._trials: dict[int, Trial] = {}
        # number of a trial of an earlier process -> the epochs it had trained
        self._earlier: dict[int, int] = {}
        self._estimates = 0
        self.first_steps: list[float] = []
        advance(0, work.trials)

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
        self._earlier[trial.number] = trial.epoch
        if trial.is_over:
            self._trials[trial.number] = trial
        self._show()

    def started(self, trial: Trial) -> None:
        """Open the trial's MLflow run."""
        self._trials[trial.number] = trial
        if not self._estimates:
            self._estimate()
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
        is_first = self._estimates == 1 and not sum(self._earlier.values())
        if is_first and EPOCH_SECONDS in metrics:
            self._estimate()
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

    def _estimate(self) -> None:
        """Print how long the trials will take; the first time that is known from earlier ones."""
        self._estimates += 1
        if self._work.trials > 1:
            line = self._work.line(self._trials.values())
            self._session.console.print(line, soft_wrap=True)

    def _left(self) -> str:
        """Return the time left; empty before the first epoch and after the last."""
        seconds = self._work.seconds_left(self._trials)
        return f", about {duration(seconds)} left" if seconds else ""

    def _show(self) -> None:
        trials = self._trials.values()
        over = sum(trial.is_over for trial in trials)
        epochs = sum(trial.epoch for trial in trials)
        scores = [
            epoch[METRIC] for trial in trials for epoch in trial.epochs if not epoch.get("diverged")
        ]
        score = self._session.config.data.score
        best = max(scores, key=lambda value: rank(value, score), default=0.0)
        trained = f"{epochs} epoch{'' if epochs == 1 else 's'}"
        note = f"{len(trials) - over} running, {trained}, best val {best:.4f}{self._left()}"
        self._advance(over, self._work.trials, note)


def student_of(session: Session, trial: TrialResult) -> ModelFile:
    """Return the model file of a trial that has a score."""
    assert trial.checkpoint is not None
    assert trial.val_score is not None
    state = read_checkpoint(trial.checkpoint)["student"]
    config = with_settings(session.config, trial.params)
    scores = dict.fromkeys((METRIC, f"val_{session.images.spec.score}"), trial.val_score)
    own = session.of_trial(trial.params)
    return student_file(config, own.images.spec, state, scores, own.student_weights(config))
