"""What is compared over several seeds, and how the scores are summed up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from raygkd.config import Config, with_settings
from raygkd.workflows.repeat import compared, numbers
from raygkd.workflows.seed_trials import lead, spread

SCORES, OTHERS = [0.9, 0.7, 0.8], [0.5, 0.6, 0.4]
PARAMS = {"lr": 0.1, "levels": [2], "alpha": 0.5}
ALONE = {**PARAMS, "method": "none", "inherit": False}
KD = {"lr": 0.1, "method": "kd", "kd_temperature": 4.0, "kd_weight": 0.9}


def test_spread_is_that_of_a_sample() -> None:
    found = spread(SCORES)
    assert found["mean"] == pytest.approx(np.mean(SCORES))
    assert found["std"] == pytest.approx(np.std(SCORES, ddof=1))


def test_a_single_score_has_no_deviation() -> None:
    assert spread([0.9]) == {"mean": 0.9, "std": None}


@pytest.mark.parametrize("scores", [[None], [0.9, None], [None, 0.9, 0.8]])
def test_a_missing_score_leaves_no_mean(scores: list[float | None]) -> None:
    assert spread(scores) == {"mean": None, "std": None}


def test_the_lead_is_that_of_each_seed() -> None:
    found = lead(SCORES, OTHERS)
    assert found["differences"] == pytest.approx([0.4, 0.1, 0.4])
    assert (found["mean"], found["std"]) == pytest.approx((0.3, np.std([0.4, 0.1, 0.4], ddof=1)))
    assert lead([0.9, None], [None, 0.5]) == {
        "differences": [None, None],
        **{"mean": None, "std": None},
    }


def test_what_is_not_known_is_no_metric() -> None:
    told = {
        "models": {"best": spread([0.9]), "kd": spread([None])},
        "best_minus": {"kd": lead([0.9], [None])},
    }
    assert numbers(told) == {"repeat_best_mean": 0.9}
    told["best_minus"]["kd"] = lead([0.9, 0.8], [0.4, 0.3])
    found = numbers(told)
    assert found["repeat_best_minus_kd_mean"] == pytest.approx(0.5)
    assert found["repeat_best_minus_kd_std"] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("settings", "task", "roles"),
    [
        ({}, "classification", {"best": PARAMS, "student_alone": ALONE, "kd": KD}),
        ({"method": "kd"}, "classification", {"best": PARAMS, "student_alone": ALONE, "kd": KD}),
        ({"method": "none"}, "classification", {"best": PARAMS}),
        ({}, "detection", {"best": PARAMS, "student_alone": ALONE}),
        (
            {"method": "none", "inherit": True},
            "detection",
            {"best": PARAMS, "student_alone": ALONE},
        ),
    ],
)
def test_the_best_settings_are_compared_with_what_there_is(
    settings: dict[str, Any], task: str, roles: dict[str, Any]
) -> None:
    assert compared(with_settings(Config(), settings), PARAMS, task) == roles
