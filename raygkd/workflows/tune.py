"""Search the method's settings: ``raygkd tune``."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from raygkd.assembly.derived_configs import student_alone
from raygkd.assembly.methods import uses_teacher
from raygkd.config import Config, seconds_of
from raygkd.metrics.ranking import higher_is_better
from raygkd.metrics.verdict import verdict_metrics
from raygkd.models import ModelFile, save_model_file
from raygkd.rayrun.searchers import CostsOf
from raygkd.rayrun.tune_search import TrialResult, run_search
from raygkd.rayrun.worker import METRIC
from raygkd.report.console import progress
from raygkd.report.figures import Curve, draw_search
from raygkd.report.tables import search_markdown
from raygkd.storage.atomic_files import Place, make_folder
from raygkd.tracking.tags import DESCRIPTION_TAG
from raygkd.workflows import draw_detections
from raygkd.workflows.budgets import Costs, built_of
from raygkd.workflows.champion import ALONE, BEST, champion
from raygkd.workflows.first_trials import Params
from raygkd.workflows.front import conclude_front
from raygkd.workflows.registering import registered
from raygkd.workflows.repeat import repeat
from raygkd.workflows.results import (
    BEST_STUDENT,
    STUDENT_ALONE,
    model_rows,
    places,
    test_images,
    test_scores,
    val_score,
    verdict_of,
)
from raygkd.workflows.resume import MODEL
from raygkd.workflows.search_forecast import Work, epochs_of_drawn
from raygkd.workflows.search_plan import open_search
from raygkd.workflows.searched_settings import Space
from raygkd.workflows.session import Session, write_result
from raygkd.workflows.teachers import TeacherOfRun, get_teachers
from raygkd.workflows.train_one import train_one
from raygkd.workflows.trial_progress import (
    SearchProgress,
    at_once,
    require_a_score,
    student_of,
    trial_key,
)

if TYPE_CHECKING:
    from raygkd.tracking.logged_models import LoggedModel

RULE = "{} validation score after the last epoch trained"
_OF_TRIAL = ("number", "params", "epochs", "val_score", "status", "error")
_COMPARED = ("test_score", "parameters")


def tune(config: Config, *, console: Console, resume: Place | None = None) -> dict[str, Any]:
    """Search the method's settings (``raygkd tune``); return what ``--json`` prints.

    The teacher is trained first if none is given, then the trials, then the student alone as a
    control: it has the best trial's settings and lacks only the teacher. Without labels there is
    no control. Validation chooses the
    winner, and whether it or the student alone is registered; the test split is scored once at the
    end, for these three models and those of ``--repeat``.
    """
    started = time.monotonic()
    with open_search(config, console=console, resume=resume) as (session, plan):
        teachers = get_teachers(session, plan.teachers, "search")
        searching = time.monotonic()
        trials, first_steps = run_trials(
            session, teachers, plan.space, plan.first, started, plan.costs
        )
        chosen = selection(
            session.config,
            trials,
            first_steps,
            score=session.images.spec.score,
            seconds=time.monotonic() - searching,
        )
        winner, best = _winner(session, trials)
        own_session = session.of_trial(winner.params)
        taught = teachers[winner.params.get("teacher", session.config.model.teacher)]
        models = {"teacher": taught.file, ALONE: best, BEST: best}
        if has_control(session):
            models[ALONE] = train_one(
                own_session,
                student_alone(session.config, winner.params),
                role="student-alone",
                folder=session.folder / STUDENT_ALONE,
                teacher=None,
                parent="search",
            )
        repeated, of_seeds = repeat(session, taught.file, winner)
        session.tracker.tags(
            "search", {f"selection.{name}": str(value) for name, value in chosen.items()}
        )
        result = _conclude(own_session, trials, winner, models, of_seeds)
        result |= {"selection": chosen, "repeat": repeated}
        of_teacher = val_score(taught.file, session.images.spec.score)
        known = {winner.number: result["best"]["registered"]}
        if result["champion"]["role"] != BEST:
            # validation ranks another student of its kind before it
            known = {winner.number: None}
        result["students"] = conclude_front(session, trials, plan.costs, of_teacher, known)
    result["teacher"]["path"] = str(taught.path)
    result["seconds"] = round(time.monotonic() - started, 1)
    write_result(result, "search")
    return result


def has_control(session: Session) -> bool:
    """Return whether the student alone is trained for comparison: it takes a teacher and labels."""
    return uses_teacher(session.config) and session.images.spec.has_labels


def run_trials(
    session: Session,
    teachers: Mapping[str, TeacherOfRun],
    space: Space,
    first: Sequence[Params] = (),
    started: float | None = None,
    costs: Costs | None = None,
) -> tuple[list[TrialResult], list[float]]:
    """Run the trials of a search; return them, and the seconds to the first step of each.

    Args:
        session: the open run.
        teachers: name -> teacher, of all that trials learn from.
        space: that settings are drawn from.
        first: settings of the first trials.
        started: when the command was, by ``time.monotonic``; None for now.
        costs: of each student, if the search depends on them.
    """
    config = session.config
    started = time.monotonic() if started is None else started
    budget = seconds_of(config.search.time_budget or "")
    concurrent = at_once(session, config.search.trials)
    files = {name: one.file for name, one in teachers.items()}
    job = session.job(config, files.pop(config.model.teacher), session.folder, teachers=files)
    with progress(session.console, f"trials ({concurrent} at a time)") as advance:
        work = Work(
            trials=config.search.trials,
            epochs=config.optim.epochs,
            spared=len(first),
            drawn=epochs_of_drawn(config.search, config.optim.epochs, len(first), _groups(space)),
            concurrent=concurrent,
        )
        observer = SearchProgress(session, advance, work)
        with session.interrupts.waiting_for(observer.running):
            trials = run_search(
                job,
                config,
                space,
                cpus=config.cluster.cpus_per_worker or 1.0,
                concurrent=concurrent,
                observer=observer,
                first=first,
                is_late=lambda: budget is not None and time.monotonic() - started > budget,
                costs_of=_costs_of(config, costs or {}),
            )
    if budget is not None and time.monotonic() - started > budget:
        session.console.print(
            f"--time-budget {config.search.time_budget} is over after {len(trials)} of "
            f"{config.search.trials} trials"
        )
    if observer.first_steps:
        session.console.print(
            f"time to first step of a trial: median {np.median(observer.first_steps):.2f} s, "
            f"longest {max(observer.first_steps):.2f} s"
        )
    return trials, observer.first_steps


def _groups(space: Space) -> int:
    """Return among how many students and input sizes the scheduler compares trials."""
    return math.prod(
        len({value for one in space if one.name == name for value in one.values}) or 1
        for name in ("student", "image_size")
    )


def _costs_of(config: Config, costs: Costs) -> CostsOf | None:
    """Return what gives the costs among the aims of a trial; None if the score is the only aim."""
    aims = config.search.aims
    if not aims or not costs:
        return None
    student = config.model.student
    return lambda params: [costs[built_of(params, student)][aim] for aim in aims]


def rule(config: Config) -> str:
    """Return how the best trial is chosen."""
    return RULE.format("highest" if higher_is_better(config.data.score) else "lowest")


def selection(
    config: Config,
    trials: Sequence[TrialResult],
    first_steps: Sequence[float],
    *,
    score: str,
    seconds: float,
) -> dict[str, Any]:
    """Return how the winner was chosen, and the cost of the search.

    Args:
        config: of the search.
        trials: all of them.
        first_steps: seconds to the first step of each trial that started training.
        score: what models are ranked by.
        seconds: duration of the trials, since the last resume.
    """
    return {
        "rule": rule(config),
        "score": score,
        "split": "val",
        "trials": len(trials),
        "epochs": config.optim.epochs,
        "scheduler": config.search.scheduler,
        "searcher": config.search.searcher,
        "trained_epochs": sum(trial.epochs for trial in trials),
        "first_step_seconds": round(float(np.median(first_steps)), 3) if first_steps else None,
        "seconds": round(seconds, 1),
    }


def _conclude(
    session: Session,
    trials: Sequence[TrialResult],
    winner: TrialResult,
    models: dict[str, ModelFile],
    of_seeds: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    """Score the best student, the teacher and the student alone; log and return the result.

    Args:
        session: the open run.
        trials: all of them.
        winner: the best one.
        models: role -> model.
        of_seeds: role -> scores on the test split with each of the other seeds.
    """
    scores = test_scores(session, models)
    rows = model_rows(models, scores)
    found = _verdict(session, scores, of_seeds)
    chosen = _save_champion(session, winner, models)
    tracker = session.tracker
    assert winner.val_score is not None
    numbers = {
        f"{role}_{key}": row[key]
        for role, row in rows.items()
        for key in _COMPARED
        if row[key] is not None
    }
    for role, row in rows.items():
        numbers |= {f"{role}_test_{name}": one for name, one in row["test_metrics"].items()}
    tracker.metrics(
        "search", {METRIC: winner.val_score, **numbers, **verdict_metrics(found)}, step=0
    )
    _draw(session, trials, {"teacher": models["teacher"], "student alone": models[ALONE]})
    if not session.images.spec.has_labels:
        del rows[ALONE]
    if session.images.spec.task == "detection":
        draw_detections.draw(session, "search", models[BEST], scores)
    told = {f"best.{name}": str(value) for name, value in winner.params.items()}
    told |= {"champion": chosen["role"]} | ({"verdict": found["line"]} if found else {})
    description = search_markdown(rows, winner.params, found["line"] if found else None)
    tracker.tags("search", told | {DESCRIPTION_TAG: description})
    logged = _register(session, models[chosen["role"]], chosen, rows, description)
    registered = {
        "model_uri": logged.uri if logged else None,
        "registered": asdict(logged) if logged else None,
    }
    is_best = chosen["role"] == BEST
    of_best = {
        "params": winner.params,
        "val_score": winner.val_score,
        "epochs": winner.epochs,
        **(registered if is_best else dict.fromkeys(registered)),
    }
    return {
        "best": rows.pop(BEST) | of_best,
        **rows,
        "champion": {**chosen, **registered},
        "test_images": test_images(session),
        "verdict": found,
        "trials": [
            {name: getattr(trial, name) for name in _OF_TRIAL}
            | {"run_id": tracker.run_id(trial_key(trial.number))}
            for trial in trials
        ],
        **places(session, "search", "parent_run_id"),
    }


def _verdict(
    session: Session,
    scores: Mapping[str, Mapping[str, Any]],
    of_seeds: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, Any] | None:
    """Return the verdict with its "line", over other seeds if there are several; None if nothing
    is distilled."""
    if not has_control(session):
        return None
    several = len(of_seeds.get(BEST, ())) > 1
    best, alone = (of_seeds[role] if several else [scores[role]] for role in (BEST, ALONE))
    return verdict_of(session, best, alone)


def _save_champion(
    session: Session, winner: TrialResult, models: Mapping[str, ModelFile]
) -> dict[str, Any]:
    """Save the student that validation ranks first as the run's model; return which it is.

    If that is the student alone, the best trial's is saved beside it.
    """
    score = session.images.spec.score
    alone = val_score(models[ALONE], score) if has_control(session) else None
    assert winner.val_score is not None
    chosen = champion(score, winner.val_score, alone)
    if chosen["role"] != BEST:
        make_folder(session.folder / BEST_STUDENT)
        save_model_file(session.folder / BEST_STUDENT / MODEL, models[BEST])
    save_model_file(session.folder / MODEL, models[chosen["role"]])
    return chosen


def _register(
    session: Session,
    model: ModelFile,
    chosen: Mapping[str, Any],
    rows: Mapping[str, Mapping[str, Any]],
    description: str,
) -> LoggedModel | None:
    """Register the champion of the search; see ``registered``."""
    return registered(
        session,
        "search",
        model,
        session.folder / MODEL,
        description=description,
        tags={
            "raygkd.rule": rule(session.config),
            "raygkd.champion": chosen["role"],
            METRIC: str(chosen["val_score"]),
            **{
                f"{role}_test_score": str(row["test_score"])
                for role, row in rows.items()
                if row["test_score"] is not None
            },
        },
    )


def _draw(session: Session, trials: Sequence[TrialResult], others: Mapping[str, ModelFile]) -> None:
    """Draw the scores of all trials, for the run's folder and MLflow."""
    curves = [Curve(status=trial.status, scores=trial.scores) for trial in trials]
    path = session.folder / "search.png"
    score = session.images.spec.score
    # a model file that was not written by a run has no score
    known = {name: one for name, of in others.items() if (one := val_score(of, score)) is not None}
    draw_search(path, curves, known)
    session.tracker.figure("search", path)


def _winner(session: Session, trials: Sequence[TrialResult]) -> tuple[TrialResult, ModelFile]:
    """Return the best trial and its student; see ``require_a_score`` for errors."""
    require_a_score(trials, SearchProgress.role)
    winner = next(trial for trial in trials if trial.status in ("finished", "stopped"))
    return winner, student_of(session, winner)
