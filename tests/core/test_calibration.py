"""How far confidence is from being right."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raygkd.metrics.calibration import BINS, calibration


def test_the_error_is_the_mean_distance_of_the_bins() -> None:
    # three answers between 14/15 and 1 of which one is wrong, one at 0.5 that is right
    found = calibration(np.array([0.98, 0.96, 1.0, 0.5]), np.array([True, False, True, True]))
    assert [one["count"] for one in found["bins"]] == [1, 3]
    high = found["bins"][1]
    assert (high["from"], high["to"]) == (14 / BINS, 1.0)
    assert (high["confidence"], high["right"]) == (pytest.approx(0.98), pytest.approx(2 / 3))
    assert found["ece"] == pytest.approx((0.5 + 3 * (0.98 - 2 / 3)) / 4)


def test_nothing_and_what_is_no_number() -> None:
    assert calibration(np.empty(0), np.empty(0, bool)) == {"count": 0, "ece": None, "bins": []}
    found = calibration(np.array([np.nan, 0.0]), np.array([False, False]))
    assert (found["count"], found["ece"]) == (2, 0.0)


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1))
def test_every_answer_is_in_the_bin_of_its_confidence(answers: list[tuple[float, bool]]) -> None:
    confidence, right = (np.array(part) for part in zip(*answers))
    found = calibration(confidence, right)
    assert sum(one["count"] for one in found["bins"]) == len(answers)
    for one in found["bins"]:
        assert one["from"] - 1e-9 <= one["confidence"] <= one["to"] + 1e-9
    assert 0 <= found["ece"] <= 1
