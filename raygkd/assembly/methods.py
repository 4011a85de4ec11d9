"""What a method needs: a task, a teacher, a baseline."""

from __future__ import annotations

from raygkd.config import Config
from raygkd.losses import BASELINES


def suits(method: str, task: str) -> bool:
    """Return whether a method is for the images of a task."""
    known = baseline_of(method)
    return known is None or BASELINES.get(known).task == task


def baseline_of(method: str) -> str | None:
    """Return the name of the baseline whose loss is a part of a method; None if there is none."""
    if method == "graph+kd":
        return "kd"
    return method if method in BASELINES.names() else None


def uses_teacher(config: Config) -> bool:
    """Return whether a run needs a teacher, to learn from or to start from."""
    return distils(config) or bool(config.model.inherit)


def distils(config: Config) -> bool:
    """Return whether a run's student learns from a teacher."""
    return config.method.method != "none"
