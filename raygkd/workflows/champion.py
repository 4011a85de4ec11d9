"""Which student of a search is used: the distilled one, or the student alone."""

from __future__ import annotations

from typing import Any

from raygkd.metrics.ranking import rank

BEST, ALONE = "best", "student_alone"


def champion(score: str, best: float, alone: float | None) -> dict[str, Any]:
    """Return the student that validation ranks first; of equal ones the distilled student.

    Args:
        score: what models are ranked by.
        best: validation score of the best trial.
        alone: that of the student alone; None if there is none.

    Returns:
        "role", "best" or "student_alone"; "val_score" of it; and "beaten", that of the other one,
        None if there is none.
    """
    if alone is not None and rank(alone, score) > rank(best, score):
        return {"role": ALONE, "val_score": alone, "beaten": best}
    return {"role": BEST, "val_score": best, "beaten": alone}
