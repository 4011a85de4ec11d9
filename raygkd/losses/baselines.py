"""The methods that are ours, and the losses of others by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raygkd.errors import ConfigError, near
from raygkd.losses.base import BaselineLoss, Method, Setup
from raygkd.losses.levels import Shape
from raygkd.registry import METHODS


@METHODS.register("none")
class LabelsAlone(Method):
    """Nothing is distilled."""


@METHODS.register("graph")
class Graph(Method):
    """Graphs of channels are matched."""

    matches_graphs = True


@METHODS.register("graph+kd")
class GraphAndKD(Method):
    """Graphs of channels are matched, and logits distilled."""

    matches_graphs = True
    baseline = "kd"


@METHODS.register("graph+dist")
class GraphAndDIST(Method):
    """Graphs of channels are matched, and correlations of the predictions."""

    matches_graphs = True
    baseline = "dist"
    baseline_share = 1.0


def baseline_of(method: str) -> str | None:
    """Return the name of the baseline whose loss is a part of a method; None if there is none."""
    entry = METHODS.get(method)
    return method if issubclass(entry, BaselineLoss) else entry.baseline


def baseline_names() -> list[str]:
    """Return the methods that are a baseline by themselves."""
    return [name for name in METHODS.names() if baseline_of(name) == name]


def baseline_class(name: str) -> type[BaselineLoss]:
    """Return the loss of a baseline.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in METHODS.names() or baseline_of(name) != name:
        known = baseline_names()
        raise ConfigError(
            f"unknown baseline {name!r}{near(name, known)} (known: {', '.join(known)})"
        )
    return METHODS.get(name)


def baseline_loss(
    name: str,
    *,
    student_shapes: Mapping[int, Shape] | None = None,
    teacher_shapes: Mapping[int, Shape] | None = None,
    levels: Sequence[int] | None = None,
    canvas: int | None = None,
    two_stage: bool = False,
    **settings: Any,
) -> BaselineLoss:
    """Return a published loss as a module; its ``weight`` is the published one of its term.

    What a baseline has no use for (the shapes, for logits) is not looked at.

    Args:
        name: one of ``baseline_names()``.
        student_shapes: level -> (C, H, W) of the student's feature maps, for adapters.
        teacher_shapes: the same of the teacher, for the same levels.
        levels: those it reads; None for its default choice of the levels of the shapes or, without
            shapes, of the features in a call.
        canvas: side in pixels of the square that both detectors see; "fgd" needs it.
        two_stage: whether the student is a two-stage detector, for which other weights were
            published.
        settings: of the baseline, in place of the published ones.

    Raises:
        ConfigError: an unknown name or setting, or one out of range; shapes or canvas are missing.
    """
    baseline = baseline_class(name)
    published = baseline.settings_for(two_stage=two_stage)
    for setting in settings:
        if setting not in published:
            raise ConfigError(
                f"{name} has no setting {setting!r}{near(setting, published)}"
                f" (allowed: {', '.join(published) or 'none'})"
            )
    setup = Setup(
        name,
        baseline.weight_for(two_stage=two_stage),
        levels if levels is not None else baseline.levels or "all",
        student_shapes,
        teacher_shapes,
        canvas,
    )
    return baseline(setup, **{**published, **settings})
