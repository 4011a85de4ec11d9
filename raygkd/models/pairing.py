"""Which level of the teacher a level of the student is matched with.

Shapes: C channels, H height, W width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

Shape = tuple[int, int, int]


def pair_levels(
    student_shapes: Mapping[int, Shape], teacher_shapes: Mapping[int, Shape]
) -> dict[int, int]:
    """Return student level -> teacher level of the pairs that suit each other best.

    The model with fewer levels has all of them paired, each with another one of the other model,
    in the order of depth. Of all such pairings it is the one with the least sum of differences,
    in resolution (octaves between the heights of the maps, which cover the same image) and in
    relative depth (0 to 1). Among equal ones the shallower partner of the shallower level counts.

    Args:
        student_shapes: level -> (C, H, W), shallow to deep.
        teacher_shapes: the same of the teacher, perhaps for images of another size.
    """
    student, teacher = list(student_shapes), list(teacher_shapes)
    count = min(len(student), len(teacher))

    def difference(i: int, j: int) -> float:
        octaves = math.log2(student_shapes[student[i]][1] / teacher_shapes[teacher[j]][1])
        return abs(octaves) + abs((i + 1) / len(student) - (j + 1) / len(teacher))

    @functools.cache
    def best(i: int, j: int, left: int) -> tuple[float, tuple[tuple[int, int], ...]]:
        """Return cost and pairs of the best ``left`` pairs from levels i and j on."""
        if left == 0:
            return 0.0, ()
        found: tuple[float, tuple[tuple[int, int], ...]] = (math.inf, ())
        for k in range(i, len(student) - left + 1):
            for m in range(j, len(teacher) - left + 1):
                cost, pairs = best(k + 1, m + 1, left - 1)
                cost += difference(k, m)
                # a difference in the last digit is none
                if cost < found[0] - 1e-9:
                    found = (cost, ((student[k], teacher[m]), *pairs))
        return found

    return dict(best(0, 0, count)[1])
