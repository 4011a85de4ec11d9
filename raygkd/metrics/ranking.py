"""The scores that models can be ranked by, and which of two is better."""

from __future__ import annotations

import math

from raygkd.errors import ConfigError
from raygkd.metrics.metric import registered_metrics
from raygkd.registry import METRICS

# what detectors can be ranked by besides registered metrics
AVERAGE_PRECISIONS = {"map": "mAP", "map50": "mAP50"}
# rank of a model whose score is not finite: a number, since schedulers interpolate between ranks
WORST = -1e9


def scores_of(task: str) -> list[str]:
    """Return the names of the scores that models of a task can be ranked by."""
    names = list(AVERAGE_PRECISIONS) if task == "detection" else []
    return names + [name for name, metric in registered_metrics().items() if metric.task == task]


def check_score(score: str, task: str) -> None:
    """Refuse a score that models of a task cannot be ranked by; "auto" is allowed.

    Raises:
        ConfigError: it is of another task.
    """
    allowed = scores_of(task)
    if score not in ("auto", *allowed):
        raise ConfigError(
            f"--score {score}: is no score for {task}, the task of these images (allowed: "
            f"{', '.join(allowed)})"
        )


def is_registered(score: str) -> bool:
    """Return whether a score is a registered metric."""
    return score in METRICS.names()


def higher_is_better(score: str) -> bool:
    """Return whether a larger value of a score is a better one; "auto" is one of those."""
    return not is_registered(score) or bool(METRICS.get(score).higher_is_better)


def score_title(score: str) -> str:
    """Return what tables and reports call a score."""
    return METRICS.get(score).title if is_registered(score) else AVERAGE_PRECISIONS[score]


def rank(value: float, score: str) -> float:
    """Return a number that is larger for a better value of a score.

    It is the value, or its negative where a lower one is better.
    """
    ranked = value if higher_is_better(score) else -value
    return ranked if math.isfinite(ranked) else WORST
