"""What a search tells: its rungs, what they saved, and which settings mattered."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raygkd.config import SearchConfig, from_mapping
from raygkd.config.search_space import Dimension
from raygkd.rayrun.search_history import Trial
from raygkd.rayrun.searchers import scheduler
from raygkd.report.search_figures import axes_of, draw_settings, heights, place
from raygkd.report.search_numbers import (
    Importance,
    Rung,
    importance,
    read_dimensions,
    rung_epochs,
    rung_table,
)
from raygkd.workflows.search_plan import Plan

LR = Dimension("lr", "loguniform", (0.01, 1.0))
LEVELS = Dimension("levels", "choice", ([1], [2], [1, 2]))
DIM = Dimension("dim", "randint", (2, 9))


def trial(number: int, scores: list[float], status: str = "finished", **params: Any) -> Trial:
    epochs = [{"epoch": float(n), "val_score": score} for n, score in enumerate(scores, start=1)]
    return Trial(number=number, params=params, epochs=epochs, status=status)


def drawn(number: int, **changes: Any) -> list[Trial]:
    """Return trials whose score is that of the learning rate alone, after one epoch or two."""
    random = np.random.default_rng(0)
    trials = []
    for at in range(number):
        lr = float(10 ** random.uniform(-2, 0))
        params = {"lr": lr, "levels": [[1], [2], [1, 2]][at % 3], "dim": 2 + at % 7, **changes}
        scores = [-((math.log10(lr) + 1) ** 2)] + ([0.9] if at % 2 else [])
        trials.append(trial(at, scores, "finished" if at % 2 else "stopped", **params))
    return trials


# rungs


@pytest.mark.parametrize("kind", ["asha", "hyperband"])
@pytest.mark.parametrize(
    ("grace", "factor", "epochs"), [(1, 3, 10), (1, 3, 9), (2, 2, 16), (3, 4, 3), (1, 2, 1)]
)
def test_rungs_are_where_the_scheduler_decides(
    kind: str, grace: int, factor: int, epochs: int
) -> None:
    config = from_mapping(
        {
            "search": {"scheduler": kind, "grace_period": grace, "reduction_factor": factor},
            "optim": {"epochs": epochs},
        }
    )
    brackets = scheduler(config)._brackets  # type: ignore[attr-defined]
    decided = {int(rung) for bracket in brackets for rung, _ in bracket._rungs if rung < epochs}
    assert set(rung_epochs(config.search, epochs)) == decided


def test_without_a_scheduler_there_is_no_rung() -> None:
    assert rung_epochs(SearchConfig(scheduler="none"), 10) == ()


def test_a_rung_tells_who_got_there_who_was_stopped_and_what_that_saved() -> None:
    trials = [
        trial(0, [0.5] * 10),
        trial(1, [0.4] * 3, "stopped"),
        trial(2, [0.1], "stopped"),
        trial(3, [0.2], "stopped"),
        trial(4, [0.3, 0.0], "diverged"),
        trial(5, [], "failed"),
    ]
    assert rung_table(trials, (1, 3, 9), 10) == [
        Rung(epoch=1, reached=5, stopped=2, saved=18),
        Rung(epoch=3, reached=2, stopped=1, saved=7),
        Rung(epoch=9, reached=1, stopped=0, saved=0),
    ]


# importance


def test_the_setting_that_decides_the_score_is_the_most_important() -> None:
    found = importance(drawn(24), [LEVELS, LR, DIM])
    assert found is not None
    assert next(iter(found.shares)) == "lr"
    means = {name: np.mean(shares) for name, shares in found.shares.items()}
    assert means["lr"] > 0.8
    assert sum(means.values()) == pytest.approx(1)
    assert not found.is_hint


def test_trials_are_compared_after_the_last_epoch_that_all_have_trained() -> None:
    found = importance(drawn(24), [LR, LEVELS, DIM])
    assert found is not None
    assert (found.epoch, found.trials) == (1, 24)


def test_a_trial_that_diverged_early_counts_with_its_last_score() -> None:
    trials = [trial(n, [0.1, 0.1 * n], lr=0.1 * (n + 1)) for n in range(4)]
    broken = [trial(4, [0.0], "diverged", lr=0.9), trial(5, [], "failed", lr=0.8)]
    found = importance(trials + broken, [LR])
    assert found is not None
    assert (found.epoch, found.trials) == (2, 5)


def test_a_setting_that_all_trials_have_alike_has_no_importance() -> None:
    trials = [trial(n, [0.1 * n], lr=0.1 * (n + 1), dim=4) for n in range(5)]
    found = importance(trials, [LR, DIM])
    assert found is not None
    assert list(found.shares) == ["lr"]


def test_few_trials_are_a_hint_and_fewer_tell_nothing() -> None:
    found = importance(drawn(8), [LR, LEVELS, DIM])
    assert found is not None
    assert found.is_hint
    assert importance(drawn(3), [LR, LEVELS, DIM]) is None
    assert importance([trial(n, [0.5], lr=0.1) for n in range(8)], [LR]) is None
    assert importance([], [LR]) is None


def test_five_trials_for_each_setting_are_no_hint() -> None:
    assert not Importance(epoch=1, trials=10, shares={"a": (0.5,), "b": (0.5,)}).is_hint
    assert Importance(epoch=1, trials=9, shares={"a": (0.5,), "b": (0.5,)}).is_hint


# the space


def test_the_space_is_read_as_the_run_has_noted_it() -> None:
    facts = {"data set, classes": ["a"], "search space, lr": {"loguniform": [0.01, 1.0]}}
    facts |= {"search space, levels": {"choice": [[1], [2], [1, 2]]}}
    assert read_dimensions(facts) == [LR, LEVELS]


def test_values_stand_on_their_axes() -> None:
    assert [place(LR, value) for value in (0.01, 0.1, 1.0)] == pytest.approx([0, 0.5, 1])
    assert [place(LEVELS, value) for value in ([1], [2], [1, 2])] == [0, 0.5, 1]
    assert [place(DIM, value) for value in (2, 5, 8)] == [0, 0.5, 1]
    assert place(Dimension("dim", "choice", (8,)), 8) == 0.5


# settings that only some trials have

GRAPH, KD = (("method", "graph"),), (("method", "kd"),)
CASES = (
    Dimension("method", "choice", ("graph", "kd")),
    LR,
    Dimension("alpha", "loguniform", (1.0, 10.0), (GRAPH,)),
    Dimension("dim", "choice", (2, 4), ((*GRAPH, ("student", "a")),)),
    Dimension("dim", "choice", (2, 4, 8), ((*GRAPH, ("student", "b")),)),
    Dimension("kd_weight", "uniform", (0.0, 1.0), (KD,)),
)


def test_a_trial_without_a_setting_has_no_point_on_its_axis() -> None:
    columns = axes_of(CASES)
    assert [one.name for one in columns] == ["method", "lr", "alpha", "dim", "kd_weight"]
    of_graph = {"method": "graph", "lr": 0.1, "alpha": 10.0, "dim": 4}
    assert heights(of_graph, columns) == pytest.approx([0.0, 0.5, 1.0, 0.5, math.nan], nan_ok=True)
    of_kd = {"method": "kd", "lr": 1.0, "kd_weight": 0.25}
    found = heights(of_kd, columns)
    assert found == pytest.approx([1.0, 1.0, math.nan, math.nan, 0.25], nan_ok=True)


def test_conditional_settings_are_read_with_their_cases_drawn_and_weighed_apart(
    tmp_path: Path,
) -> None:
    plan = Plan(space=CASES[:3], first=[], costs={}, teachers={})
    facts = json.loads(json.dumps(plan.facts()))
    assert tuple(read_dimensions(facts)) == CASES[:3]
    trials = [
        trial(n, [0.1 * n], method="graph", lr=0.1 + 0.01 * n, alpha=2.0 + n % 3) for n in range(4)
    ]
    trials += [trial(n, [0.05 * n], method="kd", lr=0.2 + 0.01 * n) for n in range(4, 8)]
    found = importance(trials, CASES[:3])
    assert found is not None
    assert found.trials == 8
    assert set(found.shares) == {"method", "lr"}
    draw_settings(tmp_path / "settings.png", trials, CASES[:3])
    assert (tmp_path / "settings.png").stat().st_size > 5000
