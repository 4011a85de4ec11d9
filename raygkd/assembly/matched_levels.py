"""The levels of teacher and student that are matched."""

from __future__ import annotations

from torch import nn

from raygkd.assembly.models import new_model
from raygkd.config import Config, with_settings
from raygkd.data.spec import ImageSpec
from raygkd.errors import ConfigError
from raygkd.losses import baseline_class, baseline_of
from raygkd.models import check_levels, feature_shapes, stage_modules


def shared_levels(config: Config, teacher: nn.Module, student: nn.Module) -> tuple[int, ...]:
    """Return the levels that both models have.

    Raises:
        ConfigError: there are none.
    """
    shared = sorted(set(stage_modules(teacher)) & set(stage_modules(student)))
    if not shared:
        raise ConfigError(
            f"teacher {config.model.teacher} and student {config.model.student} have no level in "
            "common: choose models whose pyramids overlap"
        )
    return tuple(shared)


def chosen_levels(config: Config, teacher: nn.Module, student: nn.Module) -> tuple[int, ...]:
    """Return the levels a run matches: ``--levels``, or those that the method uses by itself.

    Raises:
        ConfigError: a level that one of the models lacks, or none that both have.
    """
    shared = shared_levels(config, teacher, student)
    levels = config.method.levels
    if levels is None:
        method = config.method.method
        is_baseline = baseline_of(method) == method
        levels = baseline_class(method).levels_of(shared) if is_baseline else shared
    check_levels(levels, teacher, f"teacher {config.model.teacher}")
    check_levels(levels, student, f"student {config.model.student}")
    return levels


def level_shapes(
    config: Config, teacher: nn.Module, spec: ImageSpec
) -> dict[int, tuple[int, int, int]]:
    """Return level -> (C, H, W) of the teacher, of all levels that both models have."""
    student = new_model(config.model.student, spec)
    every = with_settings(config, {"levels": None})
    return feature_shapes(teacher, chosen_levels(every, teacher, student), spec.image_size)
