"""What a run leaves: its journal of epochs, its MLflow run, its model."""

from __future__ import annotations

import json
import math
import sqlite3
from collections import defaultdict
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mlflow import MlflowClient
from numpy.typing import NDArray

from raygkd.assembly.methods import fades
from raygkd.assembly.training import build_training
from raygkd.config import Config, from_yaml
from raygkd.data.loader import PlainStream
from raygkd.data.run_images import Images, open_images
from raygkd.data.splits import Splits
from raygkd.data.windows import load_window
from raygkd.deploy.modules import DeployedClassifier
from raygkd.engine import Training, run_epoch
from raygkd.engine.tasks import pixels
from raygkd.models import ModelFile, load_model_file

# what each process measures by its own clock, in every epoch and in its first
TIMES = ("epoch_seconds", "images_per_second")
FIRST_STEP = "first_step_seconds"
EVERY_EPOCH = {
    "train_loss", "loss_task", "train_accuracy", "val_score", "val_loss", "val_top5", "lr",
    "val_accuracy", "val_balanced-accuracy", "val_log-loss", "val_macro-f1",
    "epoch", "bad_images", "workers", *TIMES,
}  # fmt: skip
# of the final model, at its last epoch
TEST_SCORES = {
    "test_score", "test_loss", "test_top5", "test_accuracy", "test_balanced-accuracy",
    "test_log-loss", "test_macro-f1",
}  # fmt: skip


def journal(folder: Path) -> list[dict[str, float]]:
    """Return the metrics of each epoch that a run has written so far, without the times."""
    return [without_times(metrics) for metrics in json_lines(folder / "metrics.jsonl")]


def without_times(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return what does not depend on the clock."""
    return {name: value for name, value in metrics.items() if name not in (*TIMES, FIRST_STEP)}


def tracked(folder: Path) -> list[dict[str, Any]]:
    """Return what a run's tracking journal holds so far."""
    return json_lines(folder / "tracking.jsonl")


def run_ids(folder: Path) -> dict[str, str]:
    """Return key -> MLflow run, as far as a run's tracking journal knows."""
    return {entry["key"]: entry["run_id"] for entry in tracked(folder) if "run_id" in entry}


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a journal that may be growing; none if there is no file."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def curves(client: MlflowClient, run_id: str) -> dict[str, dict[int, float]]:
    """Return metric -> step -> value of an MLflow run; a step that was logged twice fails.

    The load of the machine is left out.
    """
    found: dict[str, dict[int, float]] = defaultdict(dict)
    metrics = client.get_run(run_id).data.metrics
    for name in (name for name in metrics if not name.startswith("system/")):
        for point in client.get_metric_history(run_id, name):
            assert point.step not in found[name], (name, point.step)
            found[name][point.step] = point.value
    return dict(found)


def running(client: MlflowClient) -> list[str]:
    """Return the names of the runs that an MLflow store believes to be running."""
    everything = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(everything, "attributes.status != 'FINISHED'")
    return [run.info.run_name for run in runs if run.info.status in ("RUNNING", "SCHEDULED")]


def strange_numbers(output: Path) -> list[tuple[Any, ...]]:
    """Return the metrics in the store that are no finite numbers (MLflow has 1.8e308 for inf)."""
    with closing(sqlite3.connect(output / "mlflow.db")) as store:
        rows = store.execute("SELECT key, value, is_nan FROM metrics").fetchall()
    assert rows
    return [row for row in rows if row[2] or not math.isfinite(row[1]) or abs(row[1]) > 1e300]


def configuration_of(run: Path) -> Config:
    """Return the configuration that is stored with a run."""
    path = run / "config.yaml"
    return from_yaml(path.read_text(), where=str(path))


def images_of(config: Config) -> Images:
    """Return the images of a run."""
    return open_images(config.data, seed=config.optim.seed, output=Path(config.output.output))


def whole_split(run: Path, split: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return all images of a split in 0..1, and their labels."""
    found = images_of(configuration_of(run))
    window = load_window(
        found.table,
        found.rows[split],
        found.transform(split),
        seed=0,
        epoch=0,
        skip_bad=False,
        exact=False,
    )
    return window.arrays["image"].astype(np.float32) / 255.0, window.arrays["label"]


def plain_curve(run: Path) -> list[dict[str, float]]:
    """Train a run that has no teacher again, in this process and without Ray; give its journal."""
    config = configuration_of(run)
    training = plain_training(config, images_of(config), None)
    epochs = [without_times(run_epoch(training)) for _ in range(config.optim.epochs)]
    return [epoch | {"workers": 1.0} for epoch in epochs]


def plain_training(config: Config, images: Images, teacher: ModelFile | None) -> Training:
    """Return a training in this process and without Ray."""
    stream = PlainStream(
        images.table,
        Splits(**images.rows),
        images.transform("train"),
        images.transform("val"),
        batch_size=config.optim.batch_size,
        seed=config.optim.seed,
        rank=0,
        world_size=1,
        window_rows=images.window_rows,
    )
    training = build_training(
        config,
        spec=images.spec,
        teacher_file=teacher,
        stream=stream,
        device=torch.device("cpu"),
        rank=0,
        parallel=lambda module: module,
    )
    if training.teacher is not None and fades(config):
        # a run scores a teacher that it is given on its own images
        scores = training.task.score(
            training.teacher.model,
            stream.eval_batches("val"),
            lambda batch: training.teacher_normalise(pixels(batch, training.device)),
        )
        training.teacher_score = scores[training.task.lead_score]
    return training


def rescored(model: Path, run: Path, split: str) -> Mapping[str, float]:
    """Score a model file in this process, on every image of a split at once."""
    pixels, labels = (torch.from_numpy(array) for array in whole_split(run, split))
    with torch.no_grad():
        logits = DeployedClassifier(load_model_file(model))(pixels).double()
    right = (logits.argmax(1) == labels).double().mean()
    return {"score": float(right), "loss": float(F.cross_entropy(logits, labels))}
