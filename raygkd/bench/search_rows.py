"""How much a search saves by stopping trials early, and how long a trial takes to start.

All trials are trained to the end; their epochs are then reported to ASHA in the order in which it
would have seen them, so that both sides have the same trials.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
from rich.console import Console

from raygkd.assembly.derived_configs import teacher_training
from raygkd.assembly.models import student_file
from raygkd.bench.rows import Row, Rows
from raygkd.config import Config, with_settings
from raygkd.engine import run_epoch
from raygkd.rayrun.search_history import (
    JOURNAL,
    History,
    SearchObserver,
    Trial,
    read_epochs,
)
from raygkd.rayrun.searchers import ListedSettings, scheduler
from raygkd.rayrun.worker import METRIC, make_training
from raygkd.storage.atomic_files import place
from raygkd.workflows.search_plan import open_search
from raygkd.workflows.session import Session
from raygkd.workflows.teachers import TeacherOfRun
from raygkd.workflows.tune import run_trials

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
    """Yield the share of epochs that ASHA trains, the score it misses, and a trial's start time.

    Args:
        folder: folder for the runs.
        nested_seconds: time to the first step of a trial with its own trainer, if measured.
        quick: fewer and shorter trials.
    """
    size = QUICK_SIZE if quick else SIZE
    settings = {**SETTINGS, **size, "output": str(folder)}
    curves, first_steps = full_trials(with_settings(Config(), {**settings, "scheduler": "none"}))
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
        what="shortfall of the best validation score",
        against=against,
        value=100 * (scores["full"] - scores["asha"]),
        unit="points",
        bound=0.5,
        configuration={**configuration, "scores": scores},
    )
    yield Row(
        what="start of a warm trial, to its first step",
        against=f"TorchTrainer in a trial: {nested_seconds:.1f} s" if nested_seconds else "",
        value=statistics.median(first_steps),
        unit="s",
        bound=1.0,
        configuration={**configuration, "nested seconds": nested_seconds},
    )


def full_trials(config: Config) -> tuple[list[Curve], list[float]]:
    """Train a teacher and the trials of a search; return the metrics of every epoch of each trial.

    Returns:
        the trials in the order of their numbers, and the seconds of each to its first step.
    """
    with open_search(config, console=Console(quiet=True)) as (session, plan):
        teachers = {session.config.model.teacher: trained_teacher(session)}
        _, first_steps = run_trials(session, teachers, plan.space)
    epochs = read_epochs(session.folder / JOURNAL)
    return [epochs[number] for number in sorted(epochs)], first_steps


def trained_teacher(session: Session) -> TeacherOfRun:
    """Train the teacher in this process, which takes a TorchTrainer longer to start."""
    config = teacher_training(session.config)
    job = session.job(config, None, session.folder)
    training = make_training(job, config, device=torch.device("cpu"))
    for _ in range(config.optim.epochs):
        run_epoch(training)
    student = training.objective.student
    file = student_file(config, session.images.spec, student.state_dict(), {})
    return TeacherOfRun(file, session.folder)


def asha(curves: list[Curve], config: Config, folder: Path) -> list[Trial]:
    """Return the trials under ASHA, several at a time, if all epochs take equally long.

    Args:
        curves: metrics of the full trials.
        config: configuration of the search, with the scheduler.
        folder: folder for the journal.
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
