"""Train one model: ``raygkd teacher`` and ``raygkd train``."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console

from raygkd.assembly.derived_configs import teacher_alone
from raygkd.assembly.methods import uses_teacher
from raygkd.assembly.models import is_model_file
from raygkd.config import Config
from raygkd.data.run_images import Images
from raygkd.errors import ConfigError
from raygkd.storage.atomic_files import Place
from raygkd.workflows import draw_detections
from raygkd.workflows.pair_checks import check_names, check_student, show_pair, teacher_model
from raygkd.workflows.results import model_rows, places, test_metrics, test_scores
from raygkd.workflows.session import open_session, write_result
from raygkd.workflows.teachers import get_teacher, teacher_facts
from raygkd.workflows.train_one import train_one


def teach(config: Config, *, console: Console, resume: Place | None = None) -> dict[str, Any]:
    """Train a teacher (``raygkd teacher``); return what ``--json`` prints."""
    if is_model_file(config.model.teacher):
        raise ConfigError(
            f"--teacher {config.model.teacher}: is a file, but 'raygkd teacher' trains a new "
            "model: give a model name, such as resnet20"
        )
    return _train(teacher_alone(config), "teacher", console, resume)


def distil(config: Config, *, console: Console, resume: Place | None = None) -> dict[str, Any]:
    """Train a student (``raygkd train``); return what ``--json`` prints."""
    return _train(config, "student", console, resume)


def _train(config: Config, role: str, console: Console, resume: Place | None) -> dict[str, Any]:
    started = time.monotonic()
    check_names(config, role)
    with_teacher = uses_teacher(config)

    def check(images: Images) -> dict[str, Any]:
        check_student(config, images, role)
        if not with_teacher:
            return {}
        teacher = teacher_model(config, images.spec)
        show_pair(config, images.spec, teacher, console)
        return teacher_facts(config)

    with open_session(config, role, console, resume, check) as session:
        teacher, path = get_teacher(session) if with_teacher else (None, None)
        models = {"teacher": teacher} if teacher is not None else {}
        models[role] = train_one(
            session, session.config, role=role, folder=session.folder, teacher=teacher
        )
        scores = test_scores(session, models)
        numbers = {"score": scores[role]["score"], **test_metrics(scores[role])}
        session.tracker.metrics(
            role,
            {f"test_{name}": value for name, value in numbers.items()},
            step=config.optim.epochs,
        )
        if session.images.spec.task == "detection":
            draw_detections.draw(session, role, models[role], scores)
        result: dict[str, Any] = {
            "models": model_rows(models, scores),
            "val_score": models[role].scores["val_score"],
            **places(session, role, "run_id"),
        }
        if path is not None:
            result["teacher"] = {"path": str(path)}
    result["seconds"] = round(time.monotonic() - started, 1)
    write_result(result, role)
    return result
