"""The scores that models can be ranked by, and which of two is better."""

from __future__ import annotations

import math

from raygkd.errors import ConfigError
from raygkd.metrics.metric import registered_metrics
from raygkd.registry import METRICS

# what detectors can be ranked by besides registered metrics
AVERAGE_PRECISIONS = {"map": "mAP", "map50": "mAP50"}
# the same of classifiers, by their pooled features, and without labels by their teacher
NEAREST = {"knn": "k-NN accuracy"}
WITHOUT_LABELS = {"agreement": "agreement with the teacher", "cka": "CKA with the teacher"}
# rank of a model whose score is not finite: a number, since schedulers interpolate between ranks
WORST = -1e9


def scores_of(task: str) -> list[str]:
    """Return the names of the scores that models of a task can be ranked by, given labels."""
    registered = [name for name, metric in registered_metrics().items() if metric.task == task]
    if task == "detection":
        return [*AVERAGE_PRECISIONS, *registered]
    return [*registered, *NEAREST]


def check_score(score: str, task: str, *, has_labels: bool = True) -> None:
    """Refuse a score that models of a task cannot be ranked by; "auto" is allowed.

    Raises:
        ConfigError: it is of another task, or of images with labels, or without.
    """
    allowed = scores_of(task) if has_labels else list(WITHOUT_LABELS)
    if score not in ("auto", *allowed):
        reason = f"{task}, the task of these images" if has_labels else "images without labels"
        raise ConfigError(
            f"--score {score}: is not a score for {reason} (allowed: {', '.join(allowed)})"
        )


def is_registered(score: str) -> bool:
    """Return whether a score is a registered metric."""
    return score in METRICS.names()


def higher_is_better(score: str) -> bool:
    """Return whether a larger value of a score is a better one; "auto" is one of those."""
    return not is_registered(score) or bool(METRICS.get(score).higher_is_better)


def score_title(score: str) -> str:
    """Return what tables and reports call a score."""
    if is_registered(score):
        return METRICS.get(score).title
    return {**AVERAGE_PRECISIONS, **NEAREST, **WITHOUT_LABELS}[score]


def rank(value: float, score: str) -> float:
    """Return a number that is larger for a better value of a score.

    It is the value, or its negative where a lower one is better.
    """
    ranked = value if higher_is_better(score) else -value
    return ranked if math.isfinite(ranked) else WORST
