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
from raygkd.workflows.quantised_training import QuantisedStudent, with_ranges
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
    key: str | None = None,
    quantised: QuantisedStudent | None = None,
) -> ModelFile:
    """Train one model, log it, and save it.

    If the folder has a finished model, that is returned; an interrupted run is resumed.

    Args:
        session: the open run.
        config: what to train.
        role: "teacher", "student-alone" or "student": its MLflow run's name and tag.
        key: of its MLflow run, where a command trains several of the role; None for the role.
        folder: for checkpoints, the metrics' journal and the model file.
        teacher: if the method needs one.
        parent: key of the MLflow parent run.
        quantised: the student, if it is trained in 8 bits; None in float.
    """
    if (folder / MODEL).exists():
        return load_model_file(folder / MODEL)
    spec = session.images.spec
    if role == "teacher":
        spec = spec.of_teacher()
    graph = quantised.graph if quantised is not None else None
    job = session.job(config, teacher, folder, spec, graph=graph)
    key = key or role
    session.tracker.start(
        key,
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
            session.tracker.metrics(key, metrics, step=epoch)
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
    state = read_checkpoint(checkpoint)["student"]
    if quantised is not None:
        state = quantised.own_weights(state)
    weights = _weights(session, config, role)
    model_file = with_ranges(student_file(config, spec, state, scores, weights), quantised)
    save_model_file(folder / MODEL, model_file)
    session.tracker.end(key)
    return model_file


def _weights(session: Session, config: Config, role: str) -> LoadedWeights | None:
    """Return what the model of a training started from."""
    # 'raygkd teacher' trains its teacher as a student
    if role == "teacher" and config.model.student != session.config.model.student:
        return session.weights.get("teacher")
    return session.student_weights(config)
