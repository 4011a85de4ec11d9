"""Helpers for losses over several levels: choosing levels, checking maps, and a common grid.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

# C, H and W of a feature map
Shape = tuple[int, int, int]


def coarser_grid(student: Sequence[int], teacher: Sequence[int]) -> tuple[int, int]:
    """Return H and W of the coarser of two maps, whose shapes end with H and W."""
    return min(student[-2], teacher[-2]), min(student[-1], teacher[-1])


def pooled(maps_BCHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """Average-pool maps to a grid of H and W, unless they have it already."""
    # pooling to the same grid would change nothing, and take longer than an adjacency
    if maps_BCHW.shape[2:] == grid:
        return maps_BCHW
    return F.adaptive_avg_pool2d(maps_BCHW, grid)


def on_one_grid(student_BCHW: Tensor, teacher_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the finer of two maps to the grid of the coarser one."""
    grid = coarser_grid(student_BCHW.shape, teacher_BCHW.shape)
    return pooled(student_BCHW, grid), pooled(teacher_BCHW, grid)


def levels_problem(
    student_shapes: Mapping[int, Shape], teacher_shapes: Mapping[int, Shape]
) -> str | None:
    """Return a problem if student and teacher have different levels, or no levels."""
    student_levels, teacher_levels = sorted(student_shapes), sorted(teacher_shapes)
    if student_levels != teacher_levels:
        return (
            "student and teacher must have the same levels;"
            f" got {student_levels} and {teacher_levels}"
        )
    return None if student_levels else "no levels; choose at least one"


def missing_levels_problem(requested: Iterable[int], available: Iterable[int]) -> str | None:
    """Return a problem if some of the requested levels are not available."""
    available = sorted(available)
    missing = [str(level) for level in requested if level not in available]
    if not missing:
        return None
    return (
        f"no features of level {', '.join(missing)} (available: "
        f"{', '.join(map(str, available)) or 'none'})"
    )


def maps_problem(level: int, student: Tensor, teacher: Tensor) -> str | None:
    """Return a problem if a level's maps are not (B, C, H, W) with the same B, or are empty."""
    shapes = tuple(student.shape), tuple(teacher.shape)
    complete = all(len(shape) == 4 and all(shape) for shape in shapes)
    if complete and len(student) == len(teacher):
        return None
    return (
        f"the feature maps of level {level} must be (B, C, H, W), with the same B in student and"
        f" teacher and nothing empty; got {shapes[0]} and {shapes[1]}"
    )


def without_gradient(teacher: Tensor) -> Tensor:
    """Return a teacher's tensor detached, as a copy if it was made in inference mode.

    Autograd cannot save inference-mode tensors for the backward pass.
    """
    teacher = teacher.detach()
    return teacher.clone() if teacher.is_inference() else teacher


def chosen_levels(rule: str, levels: Iterable[int]) -> tuple[int, ...]:
    """Return the levels that a rule selects, from shallow to deep.

    Args:
        rule: "all", "last" (the deepest), or "middle" (the shallower one of two in the middle).
        levels: at least one, in any order.
    """
    ordered = tuple(sorted(levels))
    if rule == "all":
        return ordered
    return ordered[-1:] if rule == "last" else (ordered[(len(ordered) - 1) // 2],)
