"""How a comparison is summed up: ranks, p-values, the table and the picture."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from raygkd.errors import RunFailed, UserError
from raygkd.rayrun.tune_search import TrialResult
from raygkd.report.tables import comparison_markdown, comparison_note, comparison_table
from raygkd.workflows.compare import best_of, method_metrics, p_value, summary
from raygkd.workflows.trial_progress import require_a_score

SEEDS = [4, 5, 6]
SCORES = {"none": [0.5, 0.6, 0.55], "kd": [0.7, 0.71, 0.75], "graph": [0.72, 0.76, 0.78]}
COSTS = {
    name: {"seconds_per_step": s, "step_ratio": s / 0.1, "peak_mb": 10.0, "peak_ratio": 1.0}
    for name, s in {"none": 0.1, "kd": 0.15, "graph": 0.2}.items()
}


def trial(number: int, val_score: float | None) -> TrialResult:
    return TrialResult(
        number=number,
        params={},
        epochs=2,
        scores={},
        val_score=val_score,
        status="finished" if val_score is not None else "failed",
        checkpoint=None,
    )


def compared(scores: dict[str, list[float | None]]) -> dict[str, Any]:
    """Return the summary of methods whose validation scores are a tenth below the test's."""
    found = {(seed, name): of[i] for name, of in scores.items() for i, seed in enumerate(SEEDS)}
    trials = {
        seeded: trial(number, None if score is None else score - 0.1)
        for number, (seeded, score) in enumerate(found.items())
    }
    known = {seeded: score for seeded, score in found.items() if score is not None}
    settings = {name: {"method": name} for name in scores}
    return summary(settings, SEEDS, trials, known, COSTS, "accuracy")


def test_methods_are_ranked_by_their_mean_against_the_best_baseline():
    found = compared(SCORES)
    assert [one["method"] for one in found["methods"]] == ["graph", "kd", "none"]
    assert found["reference"] == "kd"
    for one in found["methods"]:
        scores = SCORES[one["method"]]
        assert one["scores"] == scores
        assert one["mean"] == pytest.approx(np.mean(scores))
        assert one["std"] == pytest.approx(np.std(scores, ddof=1))
        assert one["val_mean"] == pytest.approx(np.mean(scores) - 0.1)
        assert one["seconds_per_step"] == COSTS[one["method"]]["seconds_per_step"]
        expected = None
        if one["method"] != "kd":
            expected = pytest.approx(stats.ttest_rel(scores, SCORES["kd"]).pvalue)
        assert one["p_value"] == expected


def test_p_value_is_that_of_a_paired_t_test():
    """By hand: differences 1, 2, 3 have mean 2 and deviation 1, so t = 2 sqrt 3 with 2 degrees."""
    t = 2 * 3**0.5
    by_hand = 1 - t / (2 + t**2) ** 0.5
    assert p_value([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]) == pytest.approx(by_hand)


@pytest.mark.parametrize(
    ("scores", "others"),
    [([0.5], [0.4]), ([0.5, 0.6], [0.4, 0.5 + 0.0]), ([0.5, None, 0.6], [0.1, 0.2, 0.2])],
)
def test_there_is_no_p_value_without_a_deviation(
    scores: list[float | None], others: list[float | None]
):
    # 0.6 - 0.5 and 0.5 - 0.4 are equal but for rounding
    found = p_value(scores, others)
    assert found is None or found < 1e-9


def test_a_method_without_a_score_is_last_and_is_no_reference():
    found = compared({**SCORES, "kd": [0.9, None, 0.9]})
    assert [one["method"] for one in found["methods"]] == ["graph", "none", "kd"]
    assert found["reference"] == "none"
    assert (found["methods"][-1]["mean"], found["methods"][-1]["p_value"]) == (None, None)


def test_ours_alone_is_held_to_its_first_row():
    settings = {"graph": {"method": "graph"}, "kd": {"method": "graph", "alpha": 0.0}}
    trials = {(seed, name): trial(0, 0.5) for seed in SEEDS for name in settings}
    scores = {(seed, name): SCORES[name][i] for i, seed in enumerate(SEEDS) for name in settings}
    assert summary(settings, SEEDS, trials, scores, COSTS, "accuracy")["reference"] == "graph"


def test_validation_chooses_the_best_student():
    found = compared(SCORES)
    val = {"none": [0.1, 0.1, 0.1], "kd": [0.6, 0.9, 0.7], "graph": [0.7, 0.7, 0.7]}
    trials = {(seed, n): trial(0, val[n][i]) for i, seed in enumerate(SEEDS) for n in val}
    for one in found["methods"]:
        one["val_mean"] = float(np.mean(val[one["method"]]))
    assert best_of(found, trials) == (SEEDS[1], "kd")


@pytest.mark.parametrize(
    ("mistakes", "kind"), [((True, True), UserError), ((True, False), RunFailed)]
)
def test_without_a_score_the_reasons_are_told_once_each(
    mistakes: tuple[bool, bool], kind: type[Exception]
) -> None:
    errors = ("no space left", "--dim 99 is too large")
    failed = [
        dataclasses.replace(trial(number, None), error=error, is_mistake=is_mistake)
        for number, (error, is_mistake) in enumerate(zip(errors, mistakes, strict=True))
    ]
    told = r"^no training has a score: --dim 99 is too large; no space left$"
    with pytest.raises(kind, match=told):
        require_a_score([*failed, failed[0]], "training")
    require_a_score([*failed, trial(2, 0.1)], "training")


def test_the_table_shows_every_method_with_what_it_costs():
    console = Console(width=100, record=True)
    console.print(comparison_table(compared(SCORES)))
    lines = [line.split() for line in console.export_text().splitlines() if "ms" in line]
    assert [line[:4] for line in lines] == [
        *(["1", "graph", "0.7533", "0.0306"], ["2", "kd", "0.7200", "0.0265"]),
        ["3", "none", "0.5500", "0.0500"],
    ]
    assert lines[0][6:9] == ["200", "ms", "2.00x"]


def test_the_table_in_mlflow_says_the_same():
    text = comparison_markdown(compared(SCORES))
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(SCORES)
    assert rows[2].startswith("| 1 | graph | 0.7533 | 0.0306 | 3 |")
    assert text.endswith(comparison_note(compared(SCORES)))


def test_metrics_of_a_method_are_what_is_known():
    found = {one["method"]: method_metrics(one) for one in compared(SCORES)["methods"]}
    assert found["graph"]["test_score"] == pytest.approx(np.mean(SCORES["graph"]))
    assert set(found["graph"]) - set(found["kd"]) == {"p_value"}
