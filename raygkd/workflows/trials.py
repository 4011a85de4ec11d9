"""What a search and its repeats share: how many trials at a time, and how they are recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raygkd.config import to_yaml, with_settings
from raygkd.rayrun.search import METRIC, SearchObserver
from raygkd.report.console import Advance
from raygkd.workflows.session import Session, require_room, run_tags

FIRST_STEP = "first_step_seconds"


def at_once(session: Session, trials: int) -> int:
    """Return how many of some trials run at the same time."""
    fitting = require_room(session.config, session.nodes, session.data_cpus)
    return min(fitting, trials, session.config.search.max_concurrent or fitting)


class SearchProgress(SearchObserver):
    """Records trials in MLflow, as children of the search, and shows how far they are."""

    role = "trial"

    def __init__(self, session: Session, advance: Advance, trials: int):
        self._session = session
        self._advance = advance
        self._trials = trials
        self._epochs: dict[str, int] = {}
        self._ended: set[str] = set()
        self._best = 0.0
        self.first_steps: list[float] = []
        advance(0, trials)

    def key(self, trial_id: str) -> str:
        """Return the tracker's key of a trial."""
        return trial_id

    def name(self, trial_id: str, params: Mapping[str, Any]) -> str:
        """Return what MLflow's UI calls a trial."""
        return f"trial {trial_id.rpartition('_')[2]}"

    def started(self, trial_id: str, params: Mapping[str, Any]) -> None:
        """Open the trial's MLflow run."""
        self._session.tracker.start(
            self.key(trial_id),
            self.name(trial_id, params),
            parent="search",
            params=params,
            tags=run_tags(self._session, self.role),
            texts={"config.yaml": to_yaml(with_settings(self._session.config, params))},
        )
        self._show()

    def reported(self, trial_id: str, metrics: Mapping[str, float]) -> None:
        """Log an epoch."""
        self._epochs[trial_id] = int(metrics["epoch"])
        self._best = max(self._best, metrics[METRIC])
        self.first_steps += [metrics[FIRST_STEP]] if FIRST_STEP in metrics else []
        self._session.tracker.metrics(self.key(trial_id), metrics, step=self._epochs[trial_id])
        self._show()

    def ended(self, trial_id: str, failed: bool) -> None:
        """Close the trial's MLflow run."""
        self._ended.add(trial_id)
        self._session.tracker.end(self.key(trial_id), "FAILED" if failed else "FINISHED")
        self._show()

    def _show(self) -> None:
        running = len(self._epochs.keys() - self._ended)
        epochs = sum(self._epochs.values())
        note = f"{running} running, {epochs} epochs, best val {self._best:.4f}"
        self._advance(len(self._ended), self._trials, note)
