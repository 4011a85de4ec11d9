"""Train several settings with the same seeds, and summarise their scores."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from raygkd.models import ModelFile
from raygkd.rayrun.search_history import Trial
from raygkd.rayrun.tune_search import TrialResult, run_settings
from raygkd.report.console import Advance, progress
from raygkd.storage.atomic_files import Place
from raygkd.workflows.results import test_metrics, test_scores
from raygkd.workflows.search_forecast import Work
from raygkd.workflows.session import Session
from raygkd.workflows.trial_progress import SearchProgress, at_once, student_of

# a seed, and the name of the settings that are trained with it
Seeded = tuple[int, str]


class SeedProgress(SearchProgress):
    """Logs training with several seeds; a run is named after its settings and seed.

    Args:
        session: the open run.
        advance: shows progress.
        seeded: seed and settings of each run, in order.
        concurrent: runs at a time.
    """

    def __init__(
        self, session: Session, advance: Advance, seeded: Sequence[Seeded], concurrent: int
    ):
        epochs = session.config.optim.epochs
        work = Work(
            trials=len(seeded),
            epochs=epochs,
            spared=len(seeded),
            drawn=epochs,
            concurrent=concurrent,
        )
        super().__init__(session, advance, work)
        self._seeded = seeded

    def key(self, trial: Trial) -> str:
        """Return the tracker's key of a training."""
        return self.key_of(trial.number)

    @classmethod
    def key_of(cls, number: int) -> str:
        """Return the tracker's key of the training with this number."""
        return f"{cls.role}-{number:04d}"

    def name(self, trial: Trial) -> str:
        """Return the role, the name of the settings, and the seed."""
        seed, name = self._seeded[trial.number]
        return f"{self.role} {name.replace('_', ' ')} seed {seed}"


def train_with_seeds(
    session: Session,
    teacher: ModelFile | None,
    settings: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    folder: Place,
    progress_of: type[SeedProgress],
) -> dict[Seeded, TrialResult]:
    """Train all settings with all seeds to the end; return the results.

    All use the images and splits of the session. Interrupted training in the folder is resumed.

    Args:
        session: the open run.
        teacher: if any of the settings needs it.
        settings: name -> settings.
        seeds: of initial weights, image order and augmentation.
        folder: for the folders of the runs.
        progress_of: logs and shows them.
    """
    config = session.config
    # seed by seed, so that an interrupted comparison has complete rows
    seeded: list[Seeded] = [(seed, name) for seed in seeds for name in settings]
    concurrent = at_once(session, len(seeded))
    job = session.job(config, teacher, folder)
    with progress(session.console, f"{progress_of.role}s ({concurrent} at a time)") as advance:
        observer = progress_of(session, advance, seeded, concurrent)
        with session.interrupts.waiting_for(observer.running):
            trials = run_settings(
                job,
                config,
                [{**settings[name], "seed": seed} for seed, name in seeded],
                cpus=config.cluster.cpus_per_worker or 1.0,
                concurrent=concurrent,
                observer=observer,
            )
    return dict(zip(seeded, trials, strict=True))


def students(session: Session, trials: Mapping[Seeded, TrialResult]) -> dict[Seeded, ModelFile]:
    """Return the student of every training that finished."""
    found = {}
    for seeded, trial in trials.items():
        if trial.status == "finished":
            found[seeded] = student_of(session, trial)
    return found


def scores_of_seeds(
    session: Session, trials: Mapping[Seeded, TrialResult], progress_of: type[SeedProgress]
) -> dict[Seeded, dict[str, Any]]:
    """Return the scores on the test split of every training that finished, and log them."""
    found: dict[Seeded, dict[str, Any]] = {}
    # models of one seed at a time: they are in memory together
    for seed in sorted({seed for seed, _ in trials}):
        of_seed = {seeded: trial for seeded, trial in trials.items() if seeded[0] == seed}
        models = {name: file for (_, name), file in students(session, of_seed).items()}
        for name, scores in test_scores(session, models).items():
            trial = trials[seed, name]
            found[seed, name] = scores
            numbers = {"score": scores["score"], **test_metrics(scores)}
            session.tracker.metrics(
                progress_of.key_of(trial.number),
                {f"test_{name}": value for name, value in numbers.items()},
                step=trial.epochs,
            )
    return found


def row(
    session: Session, seeded: Seeded, trial: TrialResult, progress_of: type[SeedProgress]
) -> dict[str, Any]:
    """Return the outcome of one training for the result."""
    seed, name = seeded
    keys = ("number", "params", "epochs", "val_score", "status", "error")
    told = {key: getattr(trial, key) for key in keys}
    run_id = session.tracker.run_id(progress_of.key_of(trial.number))
    return {"role": name, "seed": seed, **told, "run_id": run_id}


def spread(scores: Sequence[float | None]) -> dict[str, float | None]:
    """Return "mean" and "std" (of a sample, n - 1) of scores.

    Both are None if a score is missing; the deviation of a single score is None.
    """
    known = [score for score in scores if score is not None]
    whole = len(known) == len(scores)
    return {
        "mean": statistics.fmean(known) if whole else None,
        "std": statistics.stdev(known) if whole and len(known) > 1 else None,
    }


def lead(best: Sequence[float | None], other: Sequence[float | None]) -> dict[str, Any]:
    """Return "differences", best - other of each seed, with their ``spread``."""
    differences = [
        None if a is None or b is None else a - b for a, b in zip(best, other, strict=True)
    ]
    return {"differences": differences, **spread(differences)}
