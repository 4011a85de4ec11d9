"""Train one model: ``raygkd teacher`` and ``raygkd train``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from raygkd.assembly.derived_configs import student_alone, teacher_alone
from raygkd.assembly.methods import uses_teacher
from raygkd.assembly.models import is_model_file
from raygkd.assembly.unlabelled_runs import without_labels
from raygkd.config import Config, OptimConfig, OutputConfig
from raygkd.data.run_images import Images
from raygkd.errors import ConfigError, to_paste
from raygkd.metrics.verdict import verdict_metrics
from raygkd.models import ModelFile
from raygkd.storage.atomic_files import Place
from raygkd.workflows import draw_detections
from raygkd.workflows.pair_checks import check_names, check_student, show_pair, teacher_model
from raygkd.workflows.quantised_training import (
    QuantisedStudent,
    check_method,
    compare_in_8_bits,
    quantised_student,
)
from raygkd.workflows.results import (
    ALONE,
    STUDENT_ALONE,
    model_rows,
    places,
    test_images,
    test_metrics,
    test_scores,
    verdict_of,
)
from raygkd.workflows.resume import MODEL
from raygkd.workflows.session import Session, open_session, write_result
from raygkd.workflows.teachers import get_teacher, teacher_facts
from raygkd.workflows.train_one import train_one


def teach(config: Config, *, console: Console, resume: Place | None = None) -> dict[str, Any]:
    """Train a teacher (``raygkd teacher``); return what ``--json`` prints."""
    if is_model_file(config.model.teacher):
        raise ConfigError(
            f"--teacher {config.model.teacher}: is a file, but 'raygkd teacher' trains a new "
            "model; pass a model name, such as resnet20"
        )
    return _train(teacher_alone(config), "teacher", console, resume)


def distil(config: Config, *, console: Console, resume: Place | None = None) -> dict[str, Any]:
    """Train a student (``raygkd train``); return what ``--json`` prints."""
    if config.train.control and not uses_teacher(config):
        raise ConfigError(
            f"--control: with --method {config.method.method} the student has no teacher, so it is "
            "its own control; omit --control, or choose another method"
        )
    return _train(config, "student", console, resume)


def _train(config: Config, role: str, console: Console, resume: Place | None) -> dict[str, Any]:
    started = time.monotonic()
    config = without_labels(config)
    check_names(config, role)
    with_teacher = uses_teacher(config)
    quantised: QuantisedStudent | None = None
    if config.train.quantize:
        check_method(config)

    def check(images: Images) -> dict[str, Any]:
        nonlocal quantised
        check_student(config, images, role)
        if config.train.quantize:
            quantised = quantised_student(config, images, resume, console)
        if not with_teacher:
            return {}
        if config.train.control and not images.spec.has_labels:
            raise ConfigError(
                "--control: without labels the student cannot be trained alone; omit it, or pass "
                "labelled images (--dataset)"
            )
        teacher = teacher_model(config, images.spec)
        show_pair(config, images.spec, teacher, console)
        return teacher_facts(config)

    with open_session(config, role, console, resume, check) as session:
        teacher, path = get_teacher(session) if with_teacher else (None, None)
        if quantised is not None:
            quantised.save(session.folder)
        student = train_one(
            session,
            session.config,
            role=role,
            folder=session.folder,
            teacher=teacher,
            quantised=quantised,
        )
        models = {"teacher": teacher} if teacher is not None else {}
        if session.config.train.control:
            models[ALONE] = _train_control(session)
        models[role] = student
        scores = test_scores(session, models)
        found = verdict_of(session, [scores[role]], [scores[ALONE]]) if ALONE in models else None
        _log(session, role, scores.get(role, {}), found)
        if session.images.spec.task == "detection":
            draw_detections.draw(session, role, models[role], scores)
        result: dict[str, Any] = {
            "models": model_rows(models, scores),
            "test_images": test_images(session),
            "val_score": models[role].scores["val_score"],
            "score": session.images.spec.score,
            "verdict": found,
            "int8": compare_in_8_bits(session, quantised, student) if quantised else None,
            **places(session, role, "run_id"),
        }
        if path is not None:
            result["teacher"] = {"path": str(path)}
        if role == "teacher":
            result["next"] = _search_with(session)
    result["seconds"] = round(time.monotonic() - started, 1)
    write_result(result, role)
    return result


def _search_with(session: Session) -> str:
    """Return the command that searches with the trained teacher, on the same images."""
    data, optim, output = session.config.data, session.config.optim, session.config.output
    words: list[object] = ["tune", "--teacher", session.folder / MODEL, "--dataset", data.dataset]
    words += ["--data-dir", data.data_dir] if data.data_dir else []
    # the splits depend on it
    words += ["--seed", optim.seed] if optim.seed != OptimConfig().seed else []
    words += ["--output", output.output] if output.output != OutputConfig().output else []
    return to_paste(*words)


def _train_control(session: Session) -> ModelFile:
    """Return the same student, trained without the teacher."""
    return train_one(
        session,
        student_alone(session.config, {}),
        role="student-alone",
        folder=session.folder / STUDENT_ALONE,
        teacher=None,
        parent="student",
    )


def _log(
    session: Session, role: str, scores: Mapping[str, Any], found: Mapping[str, Any] | None
) -> None:
    """Log the model's scores on the test split, if it has any, and the verdict if there is one."""
    numbers = {**({"score": scores["score"]} if scores else {}), **test_metrics(scores)}
    metrics = {f"test_{name}": value for name, value in numbers.items()} | verdict_metrics(found)
    session.tracker.metrics(role, metrics, step=session.config.optim.epochs)
    if found is not None:
        session.tracker.tags(role, {"verdict": found["line"]})
