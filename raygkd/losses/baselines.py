"""Our own methods, and published losses by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raygkd.errors import ConfigError, near
from raygkd.losses.base import BaselineLoss, Method, Setup
from raygkd.losses.levels import Shape
from raygkd.registry import METHODS


@METHODS.register("none")
class LabelsAlone(Method):
    """No distillation."""


@METHODS.register("graph")
class Graph(Method):
    """Matching of channel graphs."""

    matches_graphs = True


@METHODS.register("graph+kd")
class GraphAndKD(Method):
    """Matching of channel graphs, and distillation of logits."""

    matches_graphs = True
    baseline = "kd"


@METHODS.register("graph+dist")
class GraphAndDIST(Method):
    """Matching of channel graphs, and of correlations of the predictions."""

    matches_graphs = True
    baseline = "dist"
    baseline_share = 1.0


@METHODS.register("graph+metrics")
class GraphAndMetrics(Method):
    """Matching of channel graphs, and of metrics of their vertices."""

    matches_graphs = True
    baseline = "graph-metrics"
    baseline_share = 1.0


def baseline_of(method: str) -> str | None:
    """Return the name of the baseline whose loss a method uses; None if there is none."""
    entry = METHODS.get(method)
    return method if issubclass(entry, BaselineLoss) else entry.baseline


def trains_classifier(method: str) -> bool:
    """Return whether a method's loss reaches the student's last layer."""
    baseline = baseline_of(method)
    return baseline is not None and METHODS.get(baseline).reads == "logits"


def reads_labels(method: str) -> bool:
    """Return whether a method's loss reads the labels, besides the loss of the labels itself."""
    baseline = baseline_of(method)
    return baseline is not None and "targets" in METHODS.get(baseline).needs


def baseline_names() -> list[str]:
    """Return the names of the methods that are baselines themselves."""
    return [name for name in METHODS.names() if baseline_of(name) == name]


def baseline_class(name: str) -> type[BaselineLoss]:
    """Return the loss class of a baseline.

    Raises:
        ConfigError: the name is unknown.
    """
    if name not in METHODS.names() or baseline_of(name) != name:
        names = baseline_names()
        raise ConfigError(
            f"unknown baseline {name!r}{near(name, names)} (known: {', '.join(names)})"
        )
    return METHODS.get(name)


def baseline_loss(
    name: str,
    *,
    student_shapes: Mapping[int, Shape] | None = None,
    teacher_shapes: Mapping[int, Shape] | None = None,
    levels: Sequence[int] | None = None,
    canvas: int | None = None,
    embedding_sizes: tuple[int, int] | None = None,
    two_stage: bool = False,
    **settings: Any,
) -> BaselineLoss:
    """Return a published loss as a module; its ``weight`` is the published weight of its term.

    Arguments that a baseline does not use (such as the shapes, for logits) are ignored.

    Args:
        name: one of ``baseline_names()``.
        student_shapes: level -> (C, H, W) of the student's feature maps, for adapters.
        teacher_shapes: the same for the teacher, with the same levels.
        levels: levels to read; None for the baseline's default choice among the levels of the
            shapes or, without shapes, among those of the features in a call.
        canvas: side in pixels of both detectors' square input; "fgd" needs it.
        embedding_sizes: entries of the student's and of the teacher's embeddings; "prg" needs them.
        two_stage: whether the student is a two-stage detector, for which other weights were
            published.
        settings: settings of the baseline that replace the published ones.

    Raises:
        ConfigError: the name or a setting is unknown, a setting is out of range, or shapes,
            canvas or sizes are missing.
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
        embedding_sizes,
    )
    return baseline(setup, **{**published, **settings})
