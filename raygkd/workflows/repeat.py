"""The best settings with other seeds, beside the student alone and logit distillation."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from raygkd import build
from raygkd.config import Config, with_settings
from raygkd.engine import read_checkpoint
from raygkd.models import ModelFile
from raygkd.rayrun.history import Trial
from raygkd.rayrun.search import TrialResult, run_settings
from raygkd.report.console import progress
from raygkd.workflows.session import Session
from raygkd.workflows.single import test_scores
from raygkd.workflows.trials import SearchProgress, at_once

BEST, ALONE, KD = "best", "student_alone", "kd"
# the method is no searched setting: only what the best settings are compared with names one
_ROLES = {None: BEST, "none": ALONE, "kd": KD}
# a repeat is a seed and a role
Repeat = tuple[int, str]


def repeat(session: Session, teacher: ModelFile, winner: TrialResult) -> dict[str, Any] | None:
    """Train the best settings and what they are compared with again, with ``--repeat`` seeds.

    The seeds follow the search's own, which chose the settings and is not among them. All roles of
    a seed share it; the split is the search's. Every model trains all epochs, and is scored on the
    test split when it has.

    Args:
        session: the open run of the search.
        teacher: of the search.
        winner: its best trial.

    Returns:
        What ``--json`` prints of it: "seeds"; "models", role -> scores, mean and standard
        deviation; "best_minus", role -> the same of the best settings' lead; "trials", how each
        training went. None if nothing is to be repeated.
    """
    config = session.config
    first = config.optim.seed + 1
    seeds = range(first, first + config.search.repeat)
    if not seeds:
        return None
    roles = compared(config, winner.params, session.images.spec.task)
    # a seed after the other, so that repeats that are broken off leave whole pairs
    repeats: list[Repeat] = [(seed, role) for seed in seeds for role in roles]
    trials = _train(session, teacher, repeats, roles)
    found = _scores(session, trials)
    scores = {role: [found.get((seed, role)) for seed in seeds] for role in roles}
    if not build.uses_teacher(config):
        # the control of a search without a teacher is its best trial, here as there
        scores[ALONE] = scores[BEST]
    told = {
        "seeds": list(seeds),
        "models": {role: {"test_scores": scores[role], **spread(scores[role])} for role in scores},
        "best_minus": {role: lead(scores[BEST], scores[role]) for role in scores if role != BEST},
        "trials": [_row(session, repeat, trial) for repeat, trial in trials.items()],
    }
    session.tracker.metrics("search", numbers(told), step=0)
    return told


def compared(config: Config, params: Mapping[str, Any], task: str) -> dict[str, dict[str, Any]]:
    """Return role -> settings of what is trained with each seed.

    Args:
        config: of the search.
        params: the best trial's settings.
        task: of the images; detectors have no logit distillation.
    """
    roles = {BEST: dict(params)}
    if build.uses_teacher(config):
        roles[ALONE] = build.without_teacher(params)
    if config.method.method != "none" and task == "classification":
        roles[KD] = build.logit_baseline(params)
    return roles


def spread(scores: Sequence[float | None]) -> dict[str, float | None]:
    """Return "mean" and "std" (of a sample, n - 1) of scores.

    Both are None where a score is missing, and the deviation of a single score is.
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


def numbers(told: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of the parent run: every mean and deviation that is known."""
    entries = {f"repeat_{role}": entry for role, entry in told["models"].items()}
    entries |= {f"repeat_best_minus_{role}": entry for role, entry in told["best_minus"].items()}
    return {
        f"{name}_{key}": entry[key]
        for name, entry in entries.items()
        for key in ("mean", "std")
        if entry[key] is not None
    }


class RepeatProgress(SearchProgress):
    """Records repeats: their runs are named after what they repeat."""

    role = "repeat"

    def key(self, trial: Trial) -> str:
        """Return the tracker's key of a repeat."""
        return _key(trial.number)

    def name(self, trial: Trial) -> str:
        """Return role and seed."""
        role = _ROLES[trial.params.get("method")]
        return f"repeat {role.replace('_', ' ')} seed {trial.params['seed']}"


def _train(
    session: Session,
    teacher: ModelFile,
    repeats: Sequence[Repeat],
    roles: Mapping[str, Mapping[str, Any]],
) -> dict[Repeat, TrialResult]:
    config = session.config
    concurrent = at_once(session, len(repeats))
    job = session.job(config, teacher, session.folder / "repeat")
    with progress(session.console, f"repeats ({concurrent} at a time)") as advance:
        observer = RepeatProgress(session, advance, len(repeats))
        with session.interrupts.waiting_for(observer.running):
            trials = run_settings(
                job,
                config,
                [{**roles[role], "seed": seed} for seed, role in repeats],
                cpus=config.cluster.cpus_per_worker or 1.0,
                concurrent=concurrent,
                observer=observer,
            )
    return dict(zip(repeats, trials, strict=True))


def _scores(session: Session, trials: Mapping[Repeat, TrialResult]) -> dict[Repeat, float]:
    """Return the score on the test split of every repeat that came to its end."""
    spec = session.images.spec
    found: dict[Repeat, float] = {}
    # a process scores one model: those of a seed at the same time, not all there are
    for seed in sorted({seed for seed, _ in trials}):
        models = {}
        for (of, role), trial in trials.items():
            if of == seed and trial.status == "finished":
                assert trial.checkpoint is not None
                state = read_checkpoint(trial.checkpoint)["student"]
                settings = with_settings(session.config, trial.params)
                models[role] = build.student_file(settings, spec, state, {})
        for role, scores in test_scores(session, models).items():
            found[seed, role] = scores["score"]
            trial = trials[seed, role]
            session.tracker.metrics(
                _key(trial.number), {"test_score": scores["score"]}, step=trial.epochs
            )
    return found


def _row(session: Session, repeat: Repeat, trial: TrialResult) -> dict[str, Any]:
    """Return how one training went."""
    seed, role = repeat
    told = {name: getattr(trial, name) for name in ("epochs", "val_score", "status", "error")}
    return {"role": role, "seed": seed, **told} | {
        "run_id": session.tracker.run_id(_key(trial.number))
    }


def _key(number: int) -> str:
    """Return the tracker's key of a repeat, which no trial of the search has."""
    return f"repeat-{number:04d}"
