"""Search the method's settings: ``raygkd tune``."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import Console

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
from raygkd.models import ModelFile, is_detector, save_model_file, short_name
from raygkd.rayrun.search_history import METRIC
from raygkd.rayrun.tune_search import TrialResult, run_search
from raygkd.report.console import progress
from raygkd.report.figures import Curve, draw_search
from raygkd.report.tables import search_markdown
from raygkd.storage.atomic_files import Place
from raygkd.tracking.tags import DESCRIPTION_TAG, IMAGES_TAG
from raygkd.workflows import draw_detections
from raygkd.workflows.pair_checks import check_names, check_student, show_pair, teacher_model
from raygkd.workflows.repeat import repeat
from raygkd.workflows.results import MODEL, model_rows, pair_name, places, test_scores
from raygkd.workflows.run_tags import run_tags
from raygkd.workflows.session import Session, open_session, write_result
from raygkd.workflows.teachers import get_teacher, teacher_facts
from raygkd.workflows.train_one import train_one
from raygkd.workflows.trial_progress import SearchProgress, at_once, require_a_score, trial_key

REGISTERED = "raygkd-{dataset}-{student}"
RULE = "highest validation score after the last epoch trained"
_OF_TRIAL = ("number", "params", "epochs", "val_score", "status", "error")
_COMPARED = ("test_score", "parameters")


def tune(config: Config, *, console: Console, resume: Place | None = None) -> dict[str, Any]:
    """Search the method's settings (``raygkd tune``); return what ``--json`` prints.

    The teacher is trained first if none is given, then the trials, then the student alone as a
    control: it has the best trial's settings and lacks only the teacher. Validation chooses the
    winner; the test split is scored once at the end, for these three models and those of
    ``--repeat``.
    """
    started = time.monotonic()
    with open_search(config, console=console, resume=resume) as (session, space):
        teacher, teacher_path = get_teacher(session, "search")
        searching = time.monotonic()
        trials, first_steps = run_trials(session, teacher, space)
        chosen = selection(
            session.config, trials, first_steps, seconds=time.monotonic() - searching
        )
        winner, best = _winner(session, trials)
        alone = best
        if uses_teacher(session.config):
            alone = train_one(
                session,
                student_alone(session.config, winner.params),
                role="student-alone",
                folder=session.folder / "student-alone",
                teacher=None,
                parent="search",
            )
        repeated = repeat(session, teacher, winner)
        models = {"teacher": teacher, "student_alone": alone, "best": best}
        session.tracker.tags(
            "search", {f"selection.{name}": str(value) for name, value in chosen.items()}
        )
        result = _conclude(session, trials, winner, models)
        result |= {"selection": chosen, "repeat": repeated}
    result["teacher"]["path"] = str(teacher_path)
    result["seconds"] = round(time.monotonic() - started, 1)
    write_result(result, "search")
    return result


@contextlib.contextmanager
def open_search(
    config: Config, *, console: Console, resume: Place | None = None
) -> Iterator[tuple[Session, tuple[Dimension, ...]]]:
    """Open the run of a search; yield it and the search space, both checked."""
    check_names(config)
    space: tuple[Dimension, ...] = ()

    def check(images: Images) -> dict[str, Any]:
        nonlocal space
        space = search_space(config, images, console)
        dimensions = {f"search space, {d.name}": {d.kind: list(d.values)} for d in space}
        return {**teacher_facts(config), **dimensions}

    with open_session(config, "search", console, resume, check) as session:
        session.tracker.start(
            "search",
            f"search {pair_name(config)}",
            tags=run_tags(session, "search"),
            texts={"config.yaml": to_yaml(session.config)},
        )
        yield session, space


def search_space(config: Config, images: Images, console: Console) -> tuple[Dimension, ...]:
    """Return the search space, checked against the models; print the matched levels.

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
        if dimension.name == "batch_size":
            largest = max(extremes(dimension))
            check_student(with_settings(config, {"batch_size": largest}), images)
    # show all levels with the maximum dimension; trials use subsets of these
    most = {"dim": min(channels.values()) - 1} if channels else {}
    show_pair(with_settings(config, most), images.spec, teacher, console)
    return space


def run_trials(
    session: Session, teacher: ModelFile, space: tuple[Dimension, ...]
) -> tuple[list[TrialResult], list[float]]:
    """Run the trials of a search; return them, and the seconds to the first step of each."""
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
            )
    if observer.first_steps:
        session.console.print(
            f"time to first step of a trial: median {np.median(observer.first_steps):.2f} s, "
            f"longest {max(observer.first_steps):.2f} s"
        )
    return trials, observer.first_steps


def selection(
    config: Config, trials: Sequence[TrialResult], first_steps: Sequence[float], *, seconds: float
) -> dict[str, Any]:
    """Return how the winner was chosen, and the cost of the search.

    Args:
        config: of the search.
        trials: all of them.
        first_steps: seconds to the first step of each trial that started training.
        seconds: duration of the trials, since the last resume.
    """
    return {
        "rule": RULE,
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
) -> dict[str, Any]:
    """Score the best student, the teacher and the student alone; log and return the result."""
    best = models["best"]
    scores = test_scores(session, models)
    save_model_file(session.folder / MODEL, best)
    rows = model_rows(models, scores)
    tracker = session.tracker
    numbers = {f"{role}_{key}": row[key] for role, row in rows.items() for key in _COMPARED}
    assert winner.val_score is not None
    tracker.metrics("search", {METRIC: winner.val_score, **numbers}, step=0)
    _draw(session, trials, {"teacher": models["teacher"], "student alone": models["student_alone"]})
    if session.images.spec.task == "detection":
        draw_detections.draw(session, "search", best, scores)
    told = {f"best.{name}": str(value) for name, value in winner.params.items()}
    description = search_markdown(rows, winner.params)
    tracker.tags("search", told | {DESCRIPTION_TAG: description})
    logged = tracker.model(
        "search",
        session.folder / MODEL if is_detector(best.name) else DeployedClassifier(best),
        example_images(session.images),
        register_as=REGISTERED.format(
            dataset=session.config.data.dataset,
            student=re.sub(r"[:/]+", "-", short_name(best.name)),
        ),
        description=description,
        tags={
            IMAGES_TAG: session.images.identity,
            "raygkd.rule": RULE,
            METRIC: str(winner.val_score),
            **{f"{role}_test_score": str(row["test_score"]) for role, row in rows.items()},
        },
    )
    chosen = {
        "params": winner.params,
        "val_score": winner.val_score,
        "epochs": winner.epochs,
        "model_uri": logged.uri if logged else None,
        "registered": asdict(logged) if logged else None,
    }
    return {
        "best": rows.pop("best") | chosen,
        **rows,
        "trials": [
            {name: getattr(trial, name) for name in _OF_TRIAL}
            | {"run_id": tracker.run_id(trial_key(trial.number))}
            for trial in trials
        ],
        **places(session, "search", "parent_run_id"),
    }


def _draw(session: Session, trials: Sequence[TrialResult], others: Mapping[str, ModelFile]) -> None:
    """Draw the scores of all trials, for the run's folder and MLflow."""
    curves = [Curve(status=trial.status, scores=trial.scores) for trial in trials]
    path = session.folder / "search.png"
    # a model file that was not written by a run has no score
    known = {name: file.scores[METRIC] for name, file in others.items() if METRIC in file.scores}
    draw_search(path, curves, known)
    session.tracker.figure("search", path)


def _winner(session: Session, trials: Sequence[TrialResult]) -> tuple[TrialResult, ModelFile]:
    """Return the best trial and its student; see ``require_a_score`` for errors."""
    require_a_score(trials, SearchProgress.role)
    winner = next(trial for trial in trials if trial.status in ("finished", "stopped"))
    assert winner.checkpoint is not None
    state = read_checkpoint(winner.checkpoint)["student"]
    config = with_settings(session.config, winner.params)
    scores = {METRIC: winner.val_score or 0.0}
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
