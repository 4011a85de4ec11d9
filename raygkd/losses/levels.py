"""What the losses over several levels share: levels, checks of their maps, and one grid for both.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

# C, H and W of a feature map
Shape = tuple[int, int, int]


def coarser_grid(student: Sequence[int], teacher: Sequence[int]) -> tuple[int, int]:
    """Return H and W of the coarser of two maps; both shapes end with theirs."""
    return min(student[-2], teacher[-2]), min(student[-1], teacher[-1])


def pooled(maps_BCHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """Average-pool maps to a grid of H and W, where they have another."""
    # pooling to the same grid changes no bit, and takes longer than an adjacency
    if maps_BCHW.shape[2:] == grid:
        return maps_BCHW
    return F.adaptive_avg_pool2d(maps_BCHW, grid)


def on_one_grid(student_BCHW: Tensor, teacher_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the finer of two maps to the grid of the coarser one; channels stay."""
    grid = coarser_grid(student_BCHW.shape, teacher_BCHW.shape)
    return pooled(student_BCHW, grid), pooled(teacher_BCHW, grid)


def levels_problem(
    student_shapes: Mapping[int, Shape], teacher_shapes: Mapping[int, Shape]
) -> str | None:
    """Return a problem if student and teacher do not have the same levels, or none."""
    student_levels, teacher_levels = sorted(student_shapes), sorted(teacher_shapes)
    if student_levels != teacher_levels:
        return (
            "student and teacher must have the same levels;"
            f" got {student_levels} and {teacher_levels}"
        )
    return None if student_levels else "no levels: choose at least one"


def absent_problem(wanted: Iterable[int], known: Iterable[int]) -> str | None:
    """Return a problem if some of the levels that are wanted are not among those known."""
    known = sorted(known)
    absent = [str(level) for level in wanted if level not in known]
    if not absent:
        return None
    return (
        f"no features of level {', '.join(absent)}"
        f" (there are those of {', '.join(map(str, known)) or 'none'})"
    )


def maps_problem(level: int, student: Tensor, teacher: Tensor) -> str | None:
    """Return a problem if a level's maps are not (B, C, H, W) of as many images, at least one."""
    shapes = tuple(student.shape), tuple(teacher.shape)
    whole = all(len(shape) == 4 and all(shape) for shape in shapes)
    if whole and len(student) == len(teacher):
        return None
    return (
        f"the feature maps of level {level} must be (B, C, H, W), with the same B in student and"
        f" teacher and nothing empty; got {shapes[0]} and {shapes[1]}"
    )


def without_gradient(teacher: Tensor) -> Tensor:
    """Return a teacher's tensor detached, as a copy if it was made in inference mode.

    Autograd refuses to keep a tensor of inference mode for the backward pass.
    """
    teacher = teacher.detach()
    return teacher.clone() if teacher.is_inference() else teacher


def chosen_levels(rule: str, levels: Iterable[int]) -> tuple[int, ...]:
    """Return those of the levels that a rule stands for, shallow to deep.

    Args:
        rule: "all", "last" (the deepest), or "middle" (the shallower one of two in the middle).
        levels: at least one, in any order.
    """
    ordered = tuple(sorted(levels))
    if rule == "all":
        return ordered
    return ordered[-1:] if rule == "last" else (ordered[(len(ordered) - 1) // 2],)
