"""The students of a search that no other one beats in score and costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from raygkd.metrics.pareto import front
from raygkd.metrics.ranking import rank
from raygkd.models import ModelFile, save_model_file
from raygkd.rayrun.tune_search import TrialResult
from raygkd.rayrun.worker import METRIC
from raygkd.report.students import draw_front
from raygkd.storage.atomic_files import Place, make_folder
from raygkd.tracking.tags import FILE_TAG
from raygkd.workflows.budgets import Built, Costs, built_name, built_of
from raygkd.workflows.registering import registered
from raygkd.workflows.resume import MODEL
from raygkd.workflows.session import Session
from raygkd.workflows.trial_progress import student_of, trial_key

# folder of the models in that of the search
FRONT = "front"


def conclude_front(
    session: Session,
    trials: Sequence[TrialResult],
    costs: Costs,
    teacher: float | None,
    known: Mapping[int, Mapping[str, Any] | None],
) -> list[dict[str, Any]] | None:
    """Save and register the models of the front, and draw it; return each student's best trial.

    Args:
        session: the open run.
        trials: all of them, best first.
        costs: of each student.
        teacher: its validation score; None if it is unknown.
        known: number of a trial -> its version in MLflow, None to register none.

    Returns:
        "number", "student", "image_size" (None if it was not searched), "val_score", "costs",
        "front", whether no other one beats it, "model", the path of its model if so, and
        "registered", its version in MLflow; the best score first. None if no costs were measured.
    """
    if not costs:
        return None
    search, score = session.config.search, session.images.spec.score
    aims = search.aims
    student_of_run = session.config.model.student
    best = best_of_each_student(trials, student_of_run)
    points = [
        [rank(float(trial.val_score or 0.0), score), *(-costs[built][aim] for aim in aims)]
        for built, trial in best.items()
    ]
    chosen = set(front(points))
    rows: list[dict[str, Any]] = []
    for place, (built, trial) in enumerate(best.items()):
        is_chosen = place in chosen
        rows.append(
            {
                "number": trial.number,
                "student": built[0],
                "image_size": built[1],
                "val_score": trial.val_score,
                "costs": dict(costs[built]),
                "front": is_chosen,
                "model": None,
                "registered": known.get(trial.number),
            }
        )
        if is_chosen:
            model, path = student_of(session, trial), _path(session, trial)
            make_folder(path.parent)
            save_model_file(path, model)
            rows[-1]["model"] = str(path)
            if trial.number not in known:
                rows[-1]["registered"] = _registered(session, trial, model, path, costs[built])
    path = session.folder / "front.png"
    draw_front(path, rows, search, score, teacher)
    session.tracker.figure("search", path)
    names = ", ".join(built_name(row["student"], row["image_size"]) for row in rows if row["front"])
    session.tracker.tags("search", {"front": names})
    return rows


def _path(session: Session, trial: TrialResult) -> Place:
    """Return the path of the model file of a trial in the front."""
    return session.folder / FRONT / f"{trial.number:04d}" / MODEL


def _registered(
    session: Session,
    trial: TrialResult,
    model: ModelFile,
    path: Place,
    costs: Mapping[str, float],
) -> dict[str, Any] | None:
    """Register the student of a trial with its costs; return its version, None if MLflow failed."""
    told = ", ".join(f"{name} {value:,.7g}" for name, value in costs.items())
    logged = registered(
        session.of_trial(trial.params),
        trial_key(trial.number),
        model,
        path,
        description=(
            f"In the front of a search: no other student beats it in all aims "
            f"({', '.join(session.config.search.objective)}). Validation score "
            f"{trial.val_score:.4f}; {told}."
        ),
        tags={
            FILE_TAG: f"{FRONT}/{path.parent.name}/{path.name}",
            METRIC: str(trial.val_score),
            **{f"raygkd.cost.{name}": f"{value:g}" for name, value in costs.items()},
        },
    )
    return None if logged is None else asdict(logged)


def best_of_each_student(trials: Sequence[TrialResult], student: str) -> dict[Built, TrialResult]:
    """Return the best trial of each student and input size, in the order of their scores.

    Args:
        trials: all of them, best first.
        student: of trials that name none.
    """
    found: dict[Built, TrialResult] = {}
    for trial in trials:
        if trial.status in ("finished", "stopped"):
            found.setdefault(built_of(trial.params, student), trial)
    return found
