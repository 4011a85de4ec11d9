"""Whether a distilled student is better than the same student alone, or may be so by chance.

Shapes: N images, S sums of a metric.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from raygkd.metrics.metric import Metric
from raygkd.metrics.ranking import is_registered, rank, score_title
from raygkd.registry import METRICS

BETTER, SAME, WORSE, UNKNOWN = "better", "no different", "worse", "unknown"
# a difference of more than this many standard errors is not chance
MOST_ERRORS = 2.0
# sums of every image of the student and of the student alone, after a training with one seed
Pair = tuple[Tensor, Tensor]


def verdict(
    score: str,
    num_classes: int,
    best: Sequence[Mapping[str, Any]],
    alone: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return how the distilled student compares with the student alone on the test split.

    Two things are chance: which images are in the test split, and the seed. The first is estimated
    from the same images of both models (``standard_error``), the second from the differences of
    several seeds, and both are added in quadrature.

    Args:
        score: what models are ranked by.
        num_classes: of the images.
        best: "score" and "parts" (see ``Task.score``) of the distilled student with each seed.
        alone: those of the student alone, with the same seeds.

    Returns:
        "outcome": "better" or "worse" where the difference is more than two standard errors, else
        "no different", or "unknown" without a standard error; "score", its name; "best" and
        "student_alone", the mean scores; "difference", the first less the second;
        "standard_error" (None if unknown); "images" (None if they were not taken into account) and
        "seeds", how many.
    """
    pairs = list(zip(best, alone, strict=True))
    mean_best, mean_alone = (statistics.fmean(one["score"] for one in of) for of in (best, alone))
    difference = mean_best - mean_alone
    errors = []
    parts = [
        (one["parts"], other["parts"])
        for one, other in pairs
        if one.get("parts") is not None and other.get("parts") is not None
    ]
    of_images = None
    if is_registered(score) and len(parts) == len(pairs):
        of_images = standard_error(METRICS.get(score)(num_classes), parts)
    errors += [of_images] if of_images is not None else []
    if len(pairs) > 1:
        differences = [one["score"] - other["score"] for one, other in pairs]
        errors.append(statistics.stdev(differences) / math.sqrt(len(pairs)))
    error = math.hypot(*errors) if errors else None
    return {
        "outcome": outcome(rank(mean_best, score) - rank(mean_alone, score), error),
        "score": score,
        "best": mean_best,
        "student_alone": mean_alone,
        "difference": difference,
        "standard_error": error,
        "images": len(parts[0][0]) if of_images is not None else None,
        "seeds": len(pairs),
    }


def outcome(lead: float, standard_error: float | None) -> str:
    """Return in words what a lead is worth.

    Args:
        lead: how much better the student is than the student alone.
        standard_error: of the lead; None if it is unknown.
    """
    if standard_error is None:
        return UNKNOWN
    if abs(lead) <= MOST_ERRORS * standard_error:
        return SAME
    return BETTER if lead > 0 else WORSE


def standard_error(metric: Metric, pairs: Sequence[Pair]) -> float | None:
    """Return the standard error of the mean difference of a metric over test images.

    It is the jackknife's: the difference is computed without each image in turn. Of a metric that
    is a mean over images, such as the accuracy, it is the standard deviation of the images'
    differences over the root of N.

    Args:
        metric: that follows from sums over images.
        pairs: of each seed, sums (N, S) of the images in the same order for both models.

    Returns:
        None if there are fewer than two images, or the metric is undefined without one of them.

    Raises:
        ValueError: models that were scored on different numbers of images.
    """
    [count, *others] = {len(sums_NS) for pair in pairs for sums_NS in pair}
    if others:
        raise ValueError(f"models were scored on {count} and on {others[0]} images")
    if count < 2:
        return None
    leads = [_without_each(metric, one) - _without_each(metric, other) for one, other in pairs]
    differences_N = torch.stack(leads).mean(0)
    spread = float((differences_N - differences_N.mean()).square().sum())
    error = math.sqrt(spread * (count - 1) / count)
    return error if math.isfinite(error) else None


def _without_each(metric: Metric, sums_NS: Tensor) -> Tensor:
    """Return the metric of all images but one, for each of them (N,)."""
    left_NS = sums_NS.sum(0) - sums_NS
    return torch.tensor([metric.value(left_S) for left_S in left_NS], dtype=torch.float64)


def verdict_metrics(found: Mapping[str, Any] | None) -> dict[str, float]:
    """Return the numbers of a verdict that are known, for MLflow."""
    if found is None:
        return {}
    known = {name: found[name] for name in ("difference", "standard_error")}
    return {f"verdict_{name}": value for name, value in known.items() if value is not None}


def verdict_line(found: Mapping[str, Any]) -> str:
    """Return a verdict in one line, as commands print it."""
    name = "" if found["score"] == "accuracy" else f"{score_title(found['score'])} "
    best, alone = (f"{found[role]:.3f}" for role in ("best", "student_alone"))
    return (
        f"verdict: {found['outcome']}: {name}{best} against {alone} alone, "
        f"{found['difference']:+z.3f} ({_certainty(found)})"
    )


def comparison_line(found: Mapping[str, Any], model: str, other: str) -> str:
    """Return how a model compares with another one, in a line.

    Args:
        found: a ``verdict`` with the other one's score under "other".
        model: what it is called.
        other: what the other one is called.
    """
    name = "" if found["score"] == "accuracy" else f"{score_title(found['score'])} "
    return (
        f"{model} against {other}: {found['outcome']}: {name}{found['best']:.3f} against "
        f"{found['other']:.3f}, {found['difference']:+z.3f} ({_certainty(found)})"
    )


def _certainty(found: Mapping[str, Any]) -> str:
    """Return the standard error, and what it is over."""
    if found["standard_error"] is None:
        return (
            f"standard error unknown: {score_title(found['score'])} needs several seeds; set "
            "--repeat, or --seeds of compare"
        )
    images = f"{found['images']:,} test images" if found["images"] is not None else None
    if found["seeds"] == 1:
        over = f"paired over {images}"
    else:
        seeds = f"{found['seeds']} seeds"
        over = f"over {seeds} and {images}" if images else f"over {seeds}"
    return f"standard error {found['standard_error']:.3f}, {over}"
