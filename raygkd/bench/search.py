"""What a search saves by stopping trials early, and what a trial costs to start.

All trials are trained to their end; then ASHA is told their epochs in the order in which it would
have seen them, so that both sides have the same trials.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from raygkd.bench.rows import Row, Rows
from raygkd.config import Config, with_settings
from raygkd.files import place
from raygkd.rayrun.history import (
    JOURNAL,
    METRIC,
    History,
    SearchObserver,
    Trial,
    read_epochs,
)
from raygkd.rayrun.search import ListedSettings, scheduler
from raygkd.workflows import tune

AT_ONCE = 2
# what a student on 8 x 8 digits learns in seconds; enough steps for an epoch to say something
SETTINGS = {
    "dataset": "digits",
    "teacher": "resnet20",
    "student": "resnet8",
    "teacher_epochs": 2,
    "epochs": 27,
    "cpus_per_worker": 1.0,
    "max_concurrent": AT_ONCE,
}
SIZE = {"trials": 64}
QUICK_SIZE = {"trials": 10, "limit_train": 192, "batch_size": 16}
# metrics of each epoch of a trial
Curve = list[dict[str, float]]


def search_rows(folder: Path, nested_seconds: float | None, *, quick: bool) -> Rows:
    """Yield what ASHA trains of what all trials would, what it finds, and the start of a trial.

    Args:
        folder: for the runs.
        nested_seconds: that a trial takes to its first step through a trainer of its own, if known.
        quick: fewer and shorter trials.
    """
    size = QUICK_SIZE if quick else SIZE
    settings = {**SETTINGS, **size, "output": str(folder)}
    full = tune(
        with_settings(Config(), {**settings, "scheduler": "none"}), console=Console(quiet=True)
    )
    epochs = read_epochs(place(full["run"]) / JOURNAL)
    curves = [epochs[number] for number in sorted(epochs)]
    trials = asha(curves, with_settings(Config(), settings), folder)
    trained = {"asha": sum(trial.epoch for trial in trials), "full": sum(map(len, curves))}
    scores = {
        "asha": max(trial.epochs[-1][METRIC] for trial in trials),
        "full": max(curve[-1][METRIC] for curve in curves),
    }
    configuration = {**SETTINGS, **size}
    what = f"ASHA, {size['trials']} trials of at most {SETTINGS['epochs']} epochs"
    against = f"{size['trials']} full trials"
    yield Row(
        what=f"epochs of {what}",
        against=against,
        value=100 * trained["asha"] / trained["full"],
        unit="%",
        bound=30.0,
        configuration={**configuration, "epochs trained": trained},
    )
    yield Row(
        what="best validation score that it misses",
        against=against,
        value=100 * (scores["full"] - scores["asha"]),
        unit="points",
        bound=0.5,
        configuration={**configuration, "scores": scores},
    )
    yield Row(
        what="start of a warm trial, to its first step",
        against=f"TorchTrainer in a trial: {nested_seconds:.1f} s" if nested_seconds else "",
        value=full["selection"]["first_step_seconds"],
        unit="s",
        bound=1.0,
        configuration={**configuration, "nested seconds": nested_seconds},
    )


def asha(curves: list[Curve], config: Config, folder: Path) -> list[Trial]:
    """Return what is left of trials under ASHA, several at a time, if all epochs take as long.

    Args:
        curves: of the trials as they are without it.
        config: of the search, with the scheduler.
        folder: for the journal.
    """
    history = History(
        place(str(folder / "asha.jsonl")),
        ListedSettings([{} for _ in curves]),
        scheduler(config),
        trials=len(curves),
        epochs=config.optim.epochs,
        seed=config.optim.seed,
        observer=SearchObserver(),
    )
    running: list[Trial] = []
    while history.left or running:
        while history.left and len(running) < AT_ONCE:
            running.append(history.begin())
        for trial in running:
            history.report(trial, curves[trial.number][trial.epoch])
        running = [trial for trial in running if not trial.is_over]
    return history.trials
