"""The requirements of a method: a task, a teacher, a baseline."""

from __future__ import annotations

from raygkd.config import Config
from raygkd.losses import baseline_class, baseline_of
from raygkd.registry import METHODS


def suits(method: str, task: str) -> bool:
    """Return whether a method supports a task."""
    baseline = baseline_of(method)
    return baseline is None or baseline_class(baseline).task == task


def matches_graphs(method: str) -> bool:
    """Return whether a method matches graphs of channels."""
    return METHODS.get(method).matches_graphs


def reads_logits(method: str) -> bool:
    """Return whether a method reads the teacher's logits, alone or beside its feature maps."""
    baseline = baseline_of(method)
    return baseline is not None and baseline_class(baseline).reads == "logits"


def scores_teacher(config: Config) -> bool:
    """Return whether the logits of a run's teacher mean the classes of the images."""
    return config.model.teacher_mode != "features"


def uses_teacher(config: Config) -> bool:
    """Return whether a run needs a teacher, for distillation or for initial weights."""
    return distils(config) or bool(config.model.inherit)


def distils(config: Config) -> bool:
    """Return whether a run's student learns from a teacher."""
    return config.method.method != "none"
