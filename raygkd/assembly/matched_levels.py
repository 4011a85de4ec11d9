"""The levels of student and teacher that a run matches.

Shapes: C channels, H height, W width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import nn

from raygkd.assembly.models import new_model
from raygkd.config import Config, LevelPair, with_settings
from raygkd.data.spec import ImageSpec
from raygkd.errors import ConfigError
from raygkd.losses import baseline_class, baseline_of
from raygkd.models import Detector, check_levels, feature_shapes, pair_levels, stage_modules

Shape = tuple[int, int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatchedLevels:
    """The levels that are matched, under the student's numbers.

    Attributes:
        pairs: level of the student -> level of the teacher.
        student_shapes: level of the student -> (C, H, W).
        teacher_shapes: level of the student -> (C, H, W) of the teacher's map that it is matched
            with.
    """

    pairs: Mapping[int, int]
    student_shapes: Mapping[int, Shape]
    teacher_shapes: Mapping[int, Shape]


def matched_levels(
    config: Config, teacher: nn.Module, student: nn.Module, spec: ImageSpec
) -> MatchedLevels:
    """Return the levels a run matches: ``--levels``, or those that the method uses by itself.

    Raises:
        ConfigError: a level that one of the models lacks, or none that both have.
    """
    known = level_pairs(config, teacher, student, spec)
    wanted = config.method.levels
    if wanted is None:
        method = config.method.method
        is_baseline = baseline_of(method) == method
        levels = baseline_class(method).levels_of(tuple(known)) if is_baseline else known
        wanted = tuple(map(LevelPair, levels))
    check_levels([pair.student for pair in wanted], student, f"student {config.model.student}")
    pairs = {pair.student: pair.teacher or known.get(pair.student, pair.student) for pair in wanted}
    check_levels(list(pairs.values()), teacher, f"teacher {config.model.teacher}")
    of_teacher = feature_shapes(teacher, list(pairs.values()), spec.of_teacher().image_size)
    return MatchedLevels(
        pairs=pairs,
        student_shapes=feature_shapes(student, list(pairs), spec.image_size),
        teacher_shapes={level: of_teacher[other] for level, other in pairs.items()},
    )


def level_pairs(
    config: Config, teacher: nn.Module, student: nn.Module, spec: ImageSpec
) -> dict[int, int]:
    """Return every level of the student that has a partner -> that level of the teacher.

    Detectors share the levels of their pyramids, which stand for strides.

    Raises:
        ConfigError: there are none.
    """
    of_student, of_teacher = stage_modules(student), stage_modules(teacher)
    if isinstance(student, Detector) or isinstance(teacher, Detector):
        pairs = {level: level for level in of_student if level in of_teacher}
    else:
        pairs = pair_levels(
            feature_shapes(student, list(of_student), spec.image_size),
            feature_shapes(teacher, list(of_teacher), spec.of_teacher().image_size),
        )
    if not pairs:
        raise ConfigError(
            f"teacher {config.model.teacher} and student {config.model.student} have no level in "
            "common; choose models whose pyramids overlap"
        )
    return pairs


def level_shapes(config: Config, teacher: nn.Module, spec: ImageSpec) -> Mapping[int, Shape]:
    """Return level -> (C, H, W) of the teacher's map, of every level of the student with a partner.

    Levels that ``--levels`` pairs in another way have the partner that it says.
    """
    student = new_model(config.model.student, spec)
    pairs = level_pairs(config, teacher, student, spec)
    given = {pair.student: pair.teacher for pair in config.method.levels or () if pair.teacher}
    every = tuple(LevelPair(level, given.get(level, other)) for level, other in pairs.items())
    return matched_levels(
        with_settings(config, {"levels": every}), teacher, student, spec
    ).teacher_shapes
