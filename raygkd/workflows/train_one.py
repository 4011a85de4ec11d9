"""Train one model."""

from __future__ import annotations

from raygkd.assembly.models import student_file
from raygkd.config import Config, given_of_entries, to_yaml
from raygkd.engine import read_checkpoint
from raygkd.models import (
    LoadedWeights,
    ModelFile,
    load_model_file,
    save_model_file,
    short_name,
)
from raygkd.rayrun import trainer
from raygkd.rayrun.step_progress import Steps
from raygkd.report.console import progress
from raygkd.storage.atomic_files import Place
from raygkd.workflows.resume import MODEL
from raygkd.workflows.run_tags import run_tags
from raygkd.workflows.session import Session


def train_one(
    session: Session,
    config: Config,
    *,
    role: str,
    folder: Place,
    teacher: ModelFile | None,
    parent: str | None = None,
) -> ModelFile:
    """Train one model, log it, and save it.

    If the folder has a finished model, that is returned; an interrupted run is resumed.

    Args:
        session: the open run.
        config: what to train.
        role: "teacher", "student-alone" or "student": its MLflow run's name and tag.
        folder: for checkpoints, the metrics' journal and the model file.
        teacher: if the method needs one.
        parent: key of the MLflow parent run.
    """
    if (folder / MODEL).exists():
        return load_model_file(folder / MODEL)
    spec = session.images.spec
    if role == "teacher":
        spec = spec.of_teacher()
    job = session.job(config, teacher, folder, spec)
    session.tracker.start(
        role,
        f"{role} {short_name(config.model.student)}",
        parent=parent,
        params={
            "student": short_name(config.model.student),
            "method": config.method.method,
            **given_of_entries(config),
        },
        tags=run_tags(session, role),
        texts={"config.yaml": to_yaml(config)},
    )
    title = f"training {role} {short_name(config.model.student)}"
    with progress(session.console, title) as advance:

        def on_epoch(metrics: dict[str, float]) -> None:
            epoch = int(metrics["epoch"])
            session.tracker.metrics(role, metrics, step=epoch)
            advance(epoch, config.optim.epochs, f"val {metrics['val_score']:.4f}")

        def on_step(steps: Steps) -> None:
            advance(steps.epoch - 1, config.optim.epochs, str(steps))

        advance(0, config.optim.epochs)
        with session.interrupts.waiting_for(lambda: [folder.name]):
            checkpoint = trainer.train(
                job, config.cluster, cpus=session.cpus(), on_epoch=on_epoch, on_step=on_step
            )
    last = trainer.last_metrics(folder)
    scores = {name: value for name, value in last.items() if name.startswith("val_")}
    model_file = student_file(
        config,
        spec,
        read_checkpoint(checkpoint)["student"],
        scores,
        _weights(session, config),
    )
    save_model_file(folder / MODEL, model_file)
    session.tracker.end(role)
    return model_file


def _weights(session: Session, config: Config) -> LoadedWeights | None:
    """Return what the model of a training started from."""
    started, own = (
        (one.model.student, one.model.student_weights) for one in (config, session.config)
    )
    return session.weights.get("student" if started == own else "teacher")
