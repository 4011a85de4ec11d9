"""Search the method's settings: ``raygkd tune``."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from raygkd.assembly.compatibility import check_settings
from raygkd.assembly.derived_configs import student_alone
from raygkd.assembly.matched_levels import level_shapes
from raygkd.assembly.methods import matches_graphs, uses_teacher
from raygkd.assembly.models import student_file
from raygkd.config import Config, given, to_yaml, with_settings
from raygkd.config.search_space import Dimension, check_space, default_space, extremes, read_space
from raygkd.data.run_images import Images
from raygkd.data.windows import load_window
from raygkd.deploy.modules import DeployedClassifier
from raygkd.engine import read_checkpoint
from raygkd.metrics.ranking import higher_is_better
from raygkd.metrics.verdict import verdict, verdict_line, verdict_metrics
from raygkd.models import ModelFile, is_detector, save_model_file, short_name
from raygkd.rayrun.tune_search import TrialResult, run_search
from raygkd.rayrun.worker import METRIC
from raygkd.report.console import progress
from raygkd.report.figures import Curve, draw_search
from raygkd.report.tables import search_markdown
from raygkd.storage.atomic_files import Place, make_folder
from raygkd.tracking.tags import DESCRIPTION_TAG, IMAGES_TAG
from raygkd.workflows import draw_detections
from raygkd.workflows.champion import ALONE, BEST, champion
from raygkd.workflows.first_trials import Params, first_trials
from raygkd.workflows.pair_checks import check_names, check_student, show_pair, teacher_model
from raygkd.workflows.repeat import repeat
from raygkd.workflows.results import (
    BEST_STUDENT,
    STUDENT_ALONE,
    model_rows,
    pair_name,
    places,
    test_scores,
    val_score,
)
from raygkd.workflows.resume import MODEL
from raygkd.workflows.run_tags import run_tags
from raygkd.workflows.session import Session, open_session, write_result
from raygkd.workflows.teachers import get_teacher, teacher_facts
from raygkd.workflows.train_one import train_one
from raygkd.workflows.trial_progress import SearchProgress, at_once, require_a_score, trial_key

if TYPE_CHECKING:
    from raygkd.tracking.logged_models import LoggedModel

REGISTERED = "raygkd-{dataset}-{student}"
RULE = "{} validation score after the last epoch trained"
_OF_TRIAL = ("number", "params", "epochs", "val_score", "status", "error")
_COMPARED = ("test_score", "parameters")


def tune(config: Config, *, console: Console, resume: Place | None = None) -> dict[str, Any]:
    """Search the method's settings (``raygkd tune``); return what ``--json`` prints.

    The teacher is trained first if none is given, then the trials, then the student alone as a
    control: it has the best trial's settings and lacks only the teacher. Validation chooses the
    winner, and whether it or the student alone is registered; the test split is scored once at the
    end, for these three models and those of ``--repeat``.
    """
    started = time.monotonic()
    with open_search(config, console=console, resume=resume) as (session, space, first):
        teacher, teacher_path = get_teacher(session, "search")
        searching = time.monotonic()
        trials, first_steps = run_trials(session, teacher, space, first)
        chosen = selection(
            session.config,
            trials,
            first_steps,
            score=session.images.spec.score,
            seconds=time.monotonic() - searching,
        )
        winner, best = _winner(session, trials)
        alone = best
        if uses_teacher(session.config):
            alone = train_one(
                session,
                student_alone(session.config, winner.params),
                role="student-alone",
                folder=session.folder / STUDENT_ALONE,
                teacher=None,
                parent="search",
            )
        repeated, of_seeds = repeat(session, teacher, winner)
        models = {"teacher": teacher, ALONE: alone, BEST: best}
        session.tracker.tags(
            "search", {f"selection.{name}": str(value) for name, value in chosen.items()}
        )
        result = _conclude(session, trials, winner, models, of_seeds)
        result |= {"selection": chosen, "repeat": repeated}
    result["teacher"]["path"] = str(teacher_path)
    result["seconds"] = round(time.monotonic() - started, 1)
    write_result(result, "search")
    return result


@contextlib.contextmanager
def open_search(
    config: Config, *, console: Console, resume: Place | None = None
) -> Iterator[tuple[Session, tuple[Dimension, ...], list[Params]]]:
    """Open the run of a search; yield it, the search space and the first trials, all checked."""
    check_names(config)
    space: tuple[Dimension, ...] = ()
    first: list[Params] = []

    def check(images: Images) -> dict[str, Any]:
        nonlocal space, first
        space, first = search_space(config, images, console)
        dimensions = {f"search space, {d.name}": {d.kind: list(d.values)} for d in space}
        return {**teacher_facts(config), **dimensions, "first trials": first}

    with open_session(config, "search", console, resume, check) as session:
        session.tracker.start(
            "search",
            f"search {pair_name(config)}",
            tags=run_tags(session, "search"),
            texts={"config.yaml": to_yaml(session.config)},
        )
        yield session, space, first


def search_space(
    config: Config, images: Images, console: Console
) -> tuple[tuple[Dimension, ...], list[Params]]:
    """Return the search space and the first trials, checked against the models; print the levels.

    Raises:
        ConfigError: an invalid space file, or settings that no trial could run with.
    """
    space = read_space(config.search.space) if config.search.space else None
    check_student(config, images)
    teacher = teacher_model(config, images.spec)
    channels: dict[int, int] = {}
    if matches_graphs(config.method.method):
        shapes = level_shapes(config, teacher, images.spec)
        channels = {level: shape[0] for level, shape in shapes.items()}
    chosen = config.method.levels and {pair.student for pair in config.method.levels}
    space = space or default_space(
        config.method.method,
        {level: width for level, width in channels.items() if chosen is None or level in chosen},
        lr=config.optim.lr,
        detection=images.spec.task == "detection",
        weights_unit=config.method.weights_unit,
        # given settings are not searched, except for the learning rate: the best is near a good one
        fixed=given(config) - {"lr"},
    )
    check_space(space, config, channels)
    for dimension in space:
        if dimension.name == "method":
            for method in dimension.values:
                check_settings(with_settings(config, {"method": method}), images.spec.task)
        if dimension.name == "batch_size":
            largest = max(extremes(dimension))
            check_student(with_settings(config, {"batch_size": largest}), images)
    first = first_trials(config, space, channels, images.spec.task)
    # show all levels with the maximum dimension; trials use subsets of these
    most = {"dim": min(channels.values()) - 1} if channels else {}
    show_pair(with_settings(config, most), images.spec, teacher, console)
    return space, first


def run_trials(
    session: Session,
    teacher: ModelFile,
    space: tuple[Dimension, ...],
    first: Sequence[Params] = (),
) -> tuple[list[TrialResult], list[float]]:
    """Run the trials of a search; return them, and the seconds to the first step of each.

    Args:
        session: the open run.
        teacher: of the trials.
        space: that settings are drawn from.
        first: settings of the first trials.
    """
    config = session.config
    concurrent = at_once(session, config.search.trials)
    job = session.job(config, teacher, session.folder)
    with progress(session.console, f"trials ({concurrent} at a time)") as advance:
        observer = SearchProgress(session, advance, config.search.trials)
        with session.interrupts.waiting_for(observer.running):
            trials = run_search(
                job,
                config,
                space,
                cpus=config.cluster.cpus_per_worker or 1.0,
                concurrent=concurrent,
                observer=observer,
                first=first,
            )
    if observer.first_steps:
        session.console.print(
            f"time to first step of a trial: median {np.median(observer.first_steps):.2f} s, "
            f"longest {max(observer.first_steps):.2f} s"
        )
    return trials, observer.first_steps


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
    if not uses_teacher(session.config):
        return None
    spec = session.images.spec
    several = len(of_seeds.get(BEST, ())) > 1
    best, alone = (of_seeds[role] if several else [scores[role]] for role in (BEST, ALONE))
    found = verdict(spec.score, len(spec.class_names), best, alone)
    return found | {"line": verdict_line(found)}


def _save_champion(
    session: Session, winner: TrialResult, models: Mapping[str, ModelFile]
) -> dict[str, Any]:
    """Save the student that validation ranks first as the run's model; return which it is.

    If that is the student alone, the best trial's is saved beside it.
    """
    score = session.images.spec.score
    alone = val_score(models[ALONE], score) if uses_teacher(session.config) else None
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
    """Register the champion of the search as a version of its model; None if MLflow has failed."""
    dataset, student = (
        re.sub(r"[:/]+", "-", name)
        for name in (session.config.data.dataset, short_name(model.name))
    )
    return session.tracker.model(
        "search",
        session.folder / MODEL if is_detector(model.name) else DeployedClassifier(model),
        example_images(session.images),
        register_as=REGISTERED.format(dataset=dataset, student=student),
        description=description,
        tags={
            IMAGES_TAG: session.images.identity,
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
    assert winner.checkpoint is not None
    state = read_checkpoint(winner.checkpoint)["student"]
    config = with_settings(session.config, winner.params)
    assert winner.val_score is not None
    scores = dict.fromkeys((METRIC, f"val_{session.images.spec.score}"), winner.val_score)
    weights = session.weights.get("student")
    return winner, student_file(config, session.images.spec, state, scores, weights)


def example_images(images: Images) -> np.ndarray:
    """Return two validation images as float32 (2, 3, S, S) in 0..1."""
    window = load_window(
        images.table,
        images.rows["val"][:2],
        images.transform("val"),
        seed=0,
        epoch=0,
        skip_bad=True,
        exact=False,
    )
    return window.arrays["image"].astype(np.float32) / 255.0
