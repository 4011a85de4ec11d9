"""Which of several models no other one beats in every aim."""

from __future__ import annotations

from collections.abc import Sequence


def front(points: Sequence[Sequence[float]]) -> list[int]:
    """Return the places of the points that no other point dominates, in their order.

    A point dominates another that it is at least as good as in every aim, and better in one. Equal
    points are all in the front.

    Args:
        points: values of each in every aim, of which more is better.
    """
    return [
        place
        for place, point in enumerate(points)
        if not any(_dominates(other, point) for other in points)
    ]


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)
