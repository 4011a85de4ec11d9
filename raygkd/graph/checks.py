"""Argument checks: each returns a one-line description of the problem, or None.

``require`` raises them, so the same check serves a function that stops at the first problem and a
constructor that reports all problems at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from raygkd.errors import ConfigError, near


def require(*problems: str | None) -> None:
    """Raise one ConfigError that lists every problem that is not None, if there is any."""
    messages = [problem for problem in problems if problem]
    if messages:
        raise ConfigError("; ".join(messages))


def temperature_problem(temperature: float, name: str = "temperature") -> str | None:
    """Return a problem if a softmax temperature is not finite and positive."""
    if 0 < temperature < math.inf:
        return None
    return f"{name} must be a finite number above 0; got {temperature}"


def weight_problems(**weights: float) -> list[str]:
    """Return the problems of a loss's term weights; at least one must be positive."""
    problems = [
        f"{name} must be a finite number, 0 or above; got {weight}"
        for name, weight in weights.items()
        if not 0 <= weight < math.inf
    ]
    if not any(weights.values()):
        problems.append(f"{', '.join(weights)} are all 0; make at least one positive")
    return problems


def share_problem(share: float) -> str | None:
    """Return a problem if the foreground's share of the total weight is outside 0..1."""
    if 0 <= share <= 1:
        return None
    return f"foreground share must be from 0 to 1; got {share}"


def choice_problem(name: str, value: str, allowed: Sequence[str]) -> str | None:
    """Return a problem if ``value`` of the option ``name`` is not one of ``allowed``."""
    if value in allowed:
        return None
    return f"unknown {name} {value!r}{near(value, allowed)} (allowed: {', '.join(allowed)})"


def dimension_problem(dim: int, channels: int) -> str | None:
    """Return a problem if a graph of ``channels`` vertices lacks ``dim`` non-trivial eigenpairs."""
    if channels < 2:
        return "a map of one channel has no graph of channels; choose other levels"
    if 1 <= dim <= channels - 1:
        return None
    return f"dim must be from 1 to {channels - 1} for a map of {channels} channels; got {dim}"


def shape_problem(name: str, student: Tensor, teacher: Tensor) -> str | None:
    """Return a problem if the shapes of student and teacher differ."""
    if student.shape == teacher.shape:
        return None
    return (
        f"{name} of student and teacher must have the same shape;"
        f" got {tuple(student.shape)} and {tuple(teacher.shape)}"
    )
