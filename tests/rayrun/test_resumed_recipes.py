"""A training with all parts of a recipe: interrupted and resumed, it equals one without a break."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command
from mlflow import MlflowClient
from records import curves, journal

from raygkd.models import load_model_file

EPOCHS = 14
TRAIN = (
    *("train", "--dataset", "digits", "--limit-train", "320", "--student", "resnet8"),
    *("--method", "dkd", "--task-weight", "0.5", "--epochs", EPOCHS, "--batch-size", "32"),
    *("--mixup", "0.4", "--cutmix", "1", "--randaugment", "--erase", "0.3"),
    *("--label-smoothing", "0.1", "--class-weights", "balanced"),
    *("--ema", "0.9", "--accumulate", "3", "--patience", EPOCHS - 1),
    # of one thread, in memory and streamed alike
    *("--teacher-cache-mb", "50", "--cpus-per-worker", "0.5"),
)
Start = Callable[..., Command]


@dataclass(frozen=True)
class Run:
    """A run that came to its end."""

    command: Command
    result: dict[str, Any]

    @property
    def folder(self) -> Path:
        return Path(self.result["run"])


@pytest.fixture(scope="module")
def whole(raygkd: Start, output: Path, untrained_teacher: Path) -> Run:
    """Images in memory, and no break."""
    command = raygkd(*TRAIN, "--teacher", untrained_teacher, "--output", output, "--json")
    assert command.wait() == 0, command.err
    return Run(command, json.loads(command.out))


@pytest.fixture(scope="module")
def resumed(raygkd: Start, output: Path, untrained_teacher: Path) -> Run:
    """Images streamed, and Ctrl-C after the first epochs."""
    given = ("--teacher", untrained_teacher, "--output", output, "--name", "broken")
    stream = ("--cache-mb", "0")
    folder = output / "runs" / "train-broken"
    command = raygkd(*TRAIN, *given, *stream)
    command.until(lambda: len(journal(folder)) > 1)
    command.stop(signal.SIGINT)
    assert 1 < len(journal(folder)) < EPOCHS
    command = raygkd("train", "--resume", folder, "--json")
    assert command.wait() == 0, command.err
    return Run(command, json.loads(command.out))


def test_a_resumed_run_equals_one_without_a_break(whole: Run, resumed: Run):
    assert journal(resumed.folder) == journal(whole.folder)
    models = [load_model_file(Path(run.result["model"])).state_dict for run in (whole, resumed)]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert resumed.result["val_score"] == whole.result["val_score"]


def test_the_recipe_is_stored_with_the_run(whole: Run, client: MlflowClient):
    told = (whole.folder / "config.yaml").read_text()
    for line in ("mixup: 0.4", "erase: 0.3", "class_weights: balanced", "accumulate: 3"):
        assert line in told
    assert len(journal(whole.folder)) == EPOCHS
    assert "teacher_cached" not in journal(whole.folder)[0]
    assert "--teacher-cache-mb has no effect" in whole.command.err
    logged = curves(client, whole.result["mlflow"]["run_id"])
    assert logged["val_score"][EPOCHS] == whole.result["val_score"]
