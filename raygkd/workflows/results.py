"""The results of a command: names, scores and paths of the models it trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raygkd.assembly.methods import scores_teacher
from raygkd.assembly.models import is_model_file
from raygkd.config import Config
from raygkd.metrics.verdict import verdict, verdict_line
from raygkd.models import (
    ModelFile,
    build_from_file,
    count_parameters,
    load_model_file,
    short_name,
)
from raygkd.rayrun import worker
from raygkd.report.console import progress
from raygkd.workflows.resume import MODEL
from raygkd.workflows.session import Session

# roles of the models in reports
TEACHER, ALONE, BEST, STUDENT = "teacher", "student alone", "best student", "student"
# folders in that of a search: of the control, and of the best trial's student where another student
# is the run's model
STUDENT_ALONE, BEST_STUDENT = "student-alone", "best-student"


def pair_name(config: Config) -> str:
    """Return "TEACHER -> STUDENT", for run names; for a teacher's file, the name of its model."""
    teacher = config.model.teacher
    if is_model_file(teacher):
        teacher = load_model_file(teacher).name
    return f"{short_name(teacher)} -> {short_name(config.model.student)}"


def model_rows(
    models: Mapping[str, ModelFile], scores: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return role -> name, parameters, test score and other test metrics of each model.

    The score is None of a model that was not scored.
    """
    return {
        role: {
            "model": short_name(file.name),
            "parameters": count_parameters(build_from_file(file)),
            "test_score": scores[role]["score"] if role in scores else None,
            "test_metrics": test_metrics(scores.get(role, {})),
        }
        for role, file in models.items()
    }


def test_metrics(scores: Mapping[str, Any]) -> dict[str, float]:
    """Return name -> value of all numbers among the scores of a model, except "score"."""
    return {
        name: value
        for name, value in scores.items()
        if isinstance(value, float) and name != "score"
    }


def val_score(file: ModelFile, score: str) -> float | None:
    """Return the validation score of a model file; None if no run has written it.

    Args:
        file: of the model; the run that trained it may have ranked by another score.
        score: which one.
    """
    known = file.scores
    # files of earlier versions have the accuracy alone
    return known.get(f"val_{score}", known.get("val_score") if score == "accuracy" else None)


def places(session: Session, key: str, run_name: str) -> dict[str, Any]:
    """Return where a result is stored, on disk and in MLflow."""
    return {
        "mlflow": {
            "tracking_uri": session.tracker.uri,
            "experiment_id": session.tracker.experiment_id,
            run_name: session.tracker.run_id(key),
        },
        "run": str(session.folder),
        "model": str(session.folder / MODEL),
    }


def test_scores(session: Session, models: Mapping[str, ModelFile]) -> dict[str, dict[str, Any]]:
    """Return each model's scores on the test split; none of a teacher without logits.

    Without labels there is no such split, and no score at all.
    """
    if not session.images.spec.has_labels:
        return {}
    if not scores_teacher(session.config):
        models = {role: file for role, file in models.items() if role != "teacher"}
    with progress(session.console, "scoring models on the test split") as advance:
        return worker.score_models(
            models,
            session.shared,
            "test",
            batch_size=session.config.optim.batch_size,
            gpus=min(1.0, session.config.cluster.gpus_per_worker),
            progress=advance,
        )


def test_images(session: Session) -> int | None:
    """Return the number of images of the test split; None without labels."""
    return len(session.images.rows["test"]) if session.images.spec.has_labels else None


def verdict_of(
    session: Session, best: Sequence[Mapping[str, Any]], alone: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the ``verdict`` on a distilled student, with the "line" that commands print.

    Args:
        session: the open run.
        best: scores of the distilled student on the test split with each seed.
        alone: those of the student alone with the same seeds.
    """
    spec = session.images.spec
    found = verdict(spec.score, len(spec.class_names), best, alone)
    return found | {"line": verdict_line(found)}
