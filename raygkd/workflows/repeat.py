"""Retrain the best settings and their baselines with other seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raygkd.assembly.derived_configs import logit_baseline, without_teacher
from raygkd.assembly.methods import scores_teacher, uses_teacher
from raygkd.config import Config
from raygkd.models import ModelFile
from raygkd.rayrun.tune_search import TrialResult
from raygkd.workflows.seed_trials import (
    SeedProgress,
    lead,
    row,
    scores_of_seeds,
    spread,
    train_with_seeds,
)
from raygkd.workflows.session import Session

BEST, ALONE, KD = "best", "student_alone", "kd"


class RepeatProgress(SeedProgress):
    """Logs repeats."""

    role = "repeat"


def repeat(
    session: Session, teacher: ModelFile, winner: TrialResult
) -> tuple[dict[str, Any] | None, dict[str, list[dict[str, Any]]]]:
    """Retrain the best settings and their baselines with ``--repeat`` other seeds.

    The seeds follow the search's own, which is excluded since it chose the settings. All roles use
    the same seeds and the split of the search. Every model trains all epochs and is then scored on
    the test split.

    Args:
        session: the open run of the search.
        teacher: of the search.
        winner: its best trial.

    Returns:
        The part of ``--json``: "seeds"; "models", role -> scores, mean and standard
        deviation; "best_minus", role -> the same of the best settings' lead; "trials", how each
        training went. None without ``--repeat``. And role -> scores on the test split, of the seeds
        that all roles have scores with.
    """
    config = session.config
    first = config.optim.seed + 1
    seeds = range(first, first + config.search.repeat)
    if not seeds:
        return None, {}
    roles = compared(config, winner.params, session.images.spec.task)
    trials = train_with_seeds(
        session, teacher, roles, seeds, session.folder / "repeat", RepeatProgress
    )
    found = scores_of_seeds(session, trials, RepeatProgress)
    scores: dict[str, list[float | None]] = {
        role: [found[seed, role]["score"] if (seed, role) in found else None for seed in seeds]
        for role in roles
    }
    whole = [seed for seed in seeds if all((seed, role) in found for role in roles)]
    if not uses_teacher(config):
        # the control of a search without a teacher is its best trial, here as there
        scores[ALONE] = scores[BEST]
    told = {
        "seeds": list(seeds),
        "models": {role: {"test_scores": scores[role], **spread(scores[role])} for role in scores},
        "best_minus": {role: lead(scores[BEST], scores[role]) for role in scores if role != BEST},
        "trials": [row(session, seeded, trials[seeded], RepeatProgress) for seeded in trials],
    }
    session.tracker.metrics("search", numbers(told), step=0)
    return told, {role: [found[seed, role] for seed in whole] for role in roles}


def compared(config: Config, params: Mapping[str, Any], task: str) -> dict[str, dict[str, Any]]:
    """Return role -> settings to train with each seed.

    Args:
        config: of the search.
        params: the best trial's settings.
        task: of the images; detectors have no logit distillation.
    """
    roles = {BEST: dict(params)}
    if uses_teacher(config):
        roles[ALONE] = without_teacher(params)
    is_kd = params.get("method") == "kd"
    has_kd = task == "classification" and scores_teacher(config)
    if config.method.method != "none" and has_kd and not is_kd:
        roles[KD] = logit_baseline(params)
    return roles


def numbers(told: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of the parent run: all known means and deviations."""
    entries = {f"repeat_{role}": entry for role, entry in told["models"].items()}
    entries |= {f"repeat_best_minus_{role}": entry for role, entry in told["best_minus"].items()}
    return {
        f"{name}_{key}": entry[key]
        for name, entry in entries.items()
        for key in ("mean", "std")
        if entry[key] is not None
    }
