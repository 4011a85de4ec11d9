"""What a search writes down, and how it goes on from there. Nothing is trained here."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from ray.tune.schedulers import FIFOScheduler

from raygkd.config import Config, with_settings
from raygkd.config.search_space import Dimension, in_space
from raygkd.errors import DataError
from raygkd.rayrun.search_history import JOURNAL, History, SearchObserver, Trial
from raygkd.rayrun.searchers import ListedSettings, scheduler, searcher
from raygkd.rayrun.trainables import tune_result

TRIALS, EPOCHS = 12, 9
SPACE = (
    Dimension("lr", "loguniform", (1e-3, 1.0)),
    Dimension("levels", "choice", ([1], [2, 3], [1, 2, 3])),
    Dimension("dim", "randint", (1, 9)),
)


class Told(SearchObserver):
    """Keeps what a search tells."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def known(self, trial: Trial) -> None:
        self.calls.append(("known", trial.number))

    def started(self, trial: Trial) -> None:
        self.calls.append(("started", trial.number))

    def reported(self, trial: Trial, metrics: Any) -> None:
        self.calls.append(("reported", trial.number))

    def ended(self, trial: Trial) -> None:
        self.calls.append(("ended", trial.number))


# what a search starts from: a trial in the space, and one of another method
FIRST = ({"lr": 0.05, "levels": [1], "dim": 4}, {"lr": 0.05, "method": "kd"})


def open_history(
    folder: Path, told: Told | None = None, first: Sequence[Any] = (), **settings: Any
) -> History:
    config = with_settings(Config(), {"trials": TRIALS, "epochs": EPOCHS, "seed": 5, **settings})
    return History(
        folder / JOURNAL,
        searcher(config, SPACE, first),
        scheduler(config),
        trials=TRIALS,
        epochs=EPOCHS,
        seed=5,
        observer=told or Told(),
        score=config.data.score,
        spared=len(first),
    )


def metrics(trial: Trial, epoch: int) -> dict[str, float]:
    """Return what a trial would score; every fifth diverges in its second epoch."""
    if trial.number % 5 == 4 and epoch == 2:
        return {"epoch": 2.0, "val_score": 0.0, "diverged": 1.0}
    score = random.Random(f"{trial.params} {epoch}").random() + epoch / 10
    return {"epoch": float(epoch), "val_score": score, "diverged": 0.0}


def outcome(history: History) -> list[tuple[Any, ...]]:
    return [(t.number, str(t.params), t.epoch, t.status, t.epochs) for t in history.trials]


def train(history: History, at_once: int, order: random.Random, steps: int) -> bool:
    """Go on for some epochs, of several trials in turn; return whether all is over."""
    running: list[Trial] = []
    for _ in range(steps):
        while history.left and len(running) < at_once:
            running.append(history.begin())
        if not running:
            return True
        trial = order.choice(running)
        history.report(trial, metrics(trial, trial.epoch + 1))
        running = [trial for trial in running if not trial.is_over]
    return False


@pytest.mark.parametrize("first", [(), FIRST], ids=["drawn", "known first"])
@pytest.mark.parametrize("how", [("random", "asha"), ("tpe", "asha"), ("random", "hyperband")])
@hypothesis_settings(max_examples=8)
@given(breaks=st.lists(st.integers(1, 12), min_size=1, max_size=5))
def test_a_search_that_is_broken_off_ends_as_any_other(
    how: tuple[str, str],
    first: Sequence[Any],
    breaks: list[int],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    settings: dict[str, Any] = dict(zip(("searcher", "scheduler"), how, strict=True))
    settings["first"] = first
    whole = open_history(tmp_path_factory.mktemp("whole"), **settings)
    assert train(whole, 1, random.Random(0), 1000)
    folder = tmp_path_factory.mktemp("broken")
    for steps in breaks:
        train(open_history(folder, **settings), 1, random.Random(0), steps)
    last = open_history(folder, **settings)
    assert train(last, 1, random.Random(0), 1000)
    assert outcome(last) == outcome(whole)
    statuses = {trial.status for trial in last.trials}
    assert statuses >= ({"finished"} if first else {"finished", "diverged"})
    assert last.left == 0
    assert [trial.params for trial in last.trials[: len(first)]] == list(first)


@pytest.mark.parametrize("how", ["asha", "hyperband"])
def test_known_trials_train_to_the_end_however_they_begin(how: str, tmp_path: Path) -> None:
    history = open_history(tmp_path, first=FIRST, scheduler=how)
    while history.left:
        trial = history.begin()
        while not trial.is_over:
            # later trials are better, but for the last ones
            score = float(min(trial.number, TRIALS - trial.number))
            history.report(trial, {"epoch": trial.epoch + 1.0, "val_score": score})
    statuses = [trial.status for trial in history.trials]
    assert statuses[: len(FIRST)] == ["finished"] * len(FIRST)
    assert "stopped" in statuses[len(FIRST) :]


@pytest.mark.parametrize("how", ["random", "tpe"])
def test_what_is_drawn_after_known_trials_is_in_the_space(how: str, tmp_path: Path) -> None:
    history = open_history(tmp_path, first=FIRST, searcher=how)
    assert train(history, 1, random.Random(0), 1000)
    drawn = [trial.params for trial in history.trials[len(FIRST) :]]
    assert all(in_space(params, SPACE) for params in drawn)
    # those that are drawn at random do not depend on the known ones
    plain = open_history(tmp_path / "plain", searcher=how)
    assert train(plain, 1, random.Random(0), 1000)
    alike = [trial.params for trial in plain.trials[: len(drawn)]] == drawn
    assert alike == (how == "random")


def test_of_losses_the_lower_goes_on_and_one_that_diverged_is_the_worst(tmp_path: Path) -> None:
    history = open_history(tmp_path, score="log-loss")
    went_on = []
    for loss in (2.0, 3.0, 1.0, 2.5, 0.5):
        trial = history.begin()
        history.report(trial, {"epoch": 1.0, "val_score": loss, "diverged": 0.0})
        went_on += [] if trial.is_over else [loss]
    assert went_on == [2.0, 1.0, 0.5]
    broken = history.begin()
    history.report(broken, {"epoch": 1.0, "val_score": 0.0, "diverged": 1.0})
    assert broken.status == "diverged"
    last = history.begin()
    history.report(last, {"epoch": 1.0, "val_score": 0.9, "diverged": 0.0})
    assert not last.is_over


def test_of_equal_scores_the_lower_loss_goes_on(tmp_path: Path) -> None:
    history = open_history(tmp_path)
    losses = [2.0, 3.0, 1.0, 2.5, float("inf"), 0.5, 9.0, float("nan"), 1.5, 4.0, 0.1, 8.0]
    went_on = []
    for loss in losses:
        trial = history.begin()
        history.report(trial, {"epoch": 1.0, "val_score": 0.1, "val_loss": loss, "diverged": 0.0})
        went_on += [] if trial.is_over else [loss]
    # each of the best third of those before it, the first one always
    assert went_on == [2.0, 1.0, 0.5, 1.5, 0.1]
    # a score counts more than any loss
    best = open_history(tmp_path / "scores")
    for score in (0.1, 0.1 + 1e-5):
        trial = best.begin()
        told = {"epoch": 1.0, "val_score": score, "val_loss": 100 * score, "diverged": 0.0}
        best.report(trial, told)
        assert not trial.is_over


def test_several_trials_that_were_broken_off_go_on_first(tmp_path: Path) -> None:
    history = open_history(tmp_path)
    first, second = history.begin(), history.begin()
    history.report(first, metrics(first, 1))
    told = Told()
    again = open_history(tmp_path, told)
    assert told.calls == [("known", 0), ("known", 1)]
    assert again.left == TRIALS
    assert [(again.begin().number) for _ in range(3)] == [0, 1, 2]
    assert again.trials[0].epochs == first.epochs
    assert [trial.params for trial in again.trials[:2]] == [first.params, second.params]


def test_what_a_trial_tells_again_is_taken_once(tmp_path: Path) -> None:
    told = Told()
    history = open_history(tmp_path, told)
    trial = history.begin()
    for epoch in (1, 1, 2, 1, 2):
        history.report(trial, metrics(trial, epoch))
    assert trial.epoch == 2
    assert told.calls == [("started", 0), ("reported", 0), ("reported", 0)]
    assert open_history(tmp_path).trials[0].epochs == trial.epochs


def test_a_line_that_was_cut_off_is_told_again(tmp_path: Path) -> None:
    history = open_history(tmp_path)
    trial = history.begin()
    for epoch in (1, 2):
        history.report(trial, metrics(trial, epoch))
    path = tmp_path / JOURNAL
    path.write_bytes(path.read_bytes()[:-7])
    again = open_history(tmp_path)
    assert again.trials[0].epoch == 1
    trial = again.begin()
    again.report(trial, metrics(trial, 2))
    assert open_history(tmp_path).trials[0].epochs == history.trials[0].epochs


def test_a_damaged_line_is_told_with_its_number(tmp_path: Path) -> None:
    history = open_history(tmp_path)
    history.begin()
    path = tmp_path / JOURNAL
    path.write_text(path.read_text() + "{}}\n" + path.read_text())
    with pytest.raises(DataError, match=r"trials.jsonl line 2 is damaged \("):
        open_history(tmp_path)


def test_a_trial_that_failed_is_tried_again_after_a_break(tmp_path: Path) -> None:
    told = Told()
    history = open_history(tmp_path, told)
    trial = history.begin()
    history.report(trial, metrics(trial, 1))
    history.fail(trial, "it is broken", is_mistake=True)
    assert (trial.status, trial.error, trial.is_mistake) == ("failed", "it is broken", True)
    assert told.calls[-1] == ("ended", 0)
    again = open_history(tmp_path)
    trial = again.begin()
    assert (trial.number, trial.epoch, trial.status) == (0, 1, "running")


def test_settings_of_a_list_are_given_in_order(tmp_path: Path) -> None:
    listed = [{"lr": 0.1}, {"lr": 0.2, "levels": [1]}]
    config = with_settings(Config(), {"scheduler": "none"})
    history = History(
        tmp_path / "new" / JOURNAL,
        ListedSettings(listed),
        scheduler(config),
        trials=2,
        epochs=1,
        seed=0,
        observer=Told(),
    )
    assert [history.begin().params for _ in range(history.left)] == listed
    assert history.left == 0


def test_a_trial_whose_patience_is_over_is_finished(tmp_path: Path) -> None:
    told = Told()
    history = open_history(tmp_path, told)
    trial = history.begin()
    history.report(trial, {"epoch": 1.0, "val_score": 0.5, "diverged": 0.0})
    assert not trial.is_over
    last = {"epoch": 2.0, "val_score": 0.5, "diverged": 0.0, "stopped_early": 1.0}
    history.report(trial, last)
    assert (trial.status, trial.epoch) == ("finished", 2)
    assert told.calls[-1] == ("ended", 0)
    assert tune_result(last, EPOCHS)["done"]
    assert not tune_result(last | {"stopped_early": 0.0}, EPOCHS)["done"]
    assert open_history(tmp_path).trials[0].status == "finished"


def test_when_the_time_is_over_trials_stop_and_a_resumed_search_goes_on_with_them(
    tmp_path: Path,
) -> None:
    late = False

    def history() -> History:
        listed = [{"lr": 0.1}, {"lr": 0.2}, {"lr": 0.3}]
        return History(
            tmp_path / JOURNAL,
            ListedSettings(listed),
            FIFOScheduler(),
            trials=3,
            epochs=3,
            seed=0,
            observer=Told(),
            is_late=lambda: late,
        )

    first = history()
    one, other = first.begin(), first.begin()
    first.report(one, {"epoch": 1, "val_score": 0.5})
    assert not first.is_late
    late = True
    assert first.is_late
    first.report(one, {"epoch": 2, "val_score": 0.6})
    first.report(other, {"epoch": 1, "val_score": 0.4})
    assert [trial.status for trial in first.trials] == ["stopped", "stopped"]
    late = False
    again = history()
    assert again.left == 3
    assert [again.begin().number for _ in range(3)] == [0, 1, 2]
    assert [trial.epoch for trial in again.trials] == [2, 1, 0]
