"""Stopping a run whose validation score no longer improves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raygkd.metrics.ranking import rank

# metric of the epoch after which a run has stopped
STOPPED_EARLY = "stopped_early"


class Patience:
    """Counts the epochs since the best validation score.

    Args:
        epochs: how many without a better score end the run.
        score: name of the score, which says whether a larger one is better.
    """

    def __init__(self, epochs: int, score: str):
        self._epochs, self._score = epochs, score
        self._best: float | None = None
        self._waited = 0

    @property
    def is_over(self) -> bool:
        """Whether the run is to stop."""
        return self._waited >= self._epochs

    def add(self, val_score: float) -> None:
        """Add the score of an epoch."""
        ranked = rank(val_score, self._score)
        if self._best is None or ranked > self._best:
            self._best, self._waited = ranked, 0
        else:
            self._waited += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the best rank and the epochs since."""
        return {"best": self._best, "waited": self._waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state_dict`` returned."""
        self._best, self._waited = state["best"], state["waited"]
