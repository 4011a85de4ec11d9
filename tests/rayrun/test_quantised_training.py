"""``raygkd train --start-from RUN --quantize int8``: runs, resumed and with two workers."""

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
from records import journal

from raygkd.models import ModelFile, load_model_file

EPOCHS = 3
Start = Callable[..., Command]


@dataclass(frozen=True)
class Trained:
    """A student in 8 bits.

    Attributes:
        start: folder of the run that it started from.
        result: of its training.
    """

    start: Path
    result: dict[str, Any]

    @property
    def file(self) -> ModelFile:
        return load_model_file(Path(self.result["model"]))


def options(start: Path, name: str, *others: str) -> tuple[str | Path, ...]:
    given = ("--epochs", str(EPOCHS), "--lr", "0.01", "--name", name, *others)
    return ("train", "--start-from", start, "--quantize", "int8", *given)


@pytest.fixture(scope="module")
def trained(raygkd: Start, output: Path, untrained_teacher: Path) -> Trained:
    images = ("--dataset", "digits", "--limit-train", "256", "--method", "graph+kd")
    models = ("--teacher", untrained_teacher, "--student", "resnet8", "--kd-weight", "0.1")
    run = ("--epochs", "4", "--output", output, "--name", "in-float")
    raygkd("train", *images, *models, *run, "--json").result()
    start = output / "runs" / "train-in-float"
    return Trained(start, raygkd(*options(start, "in-8-bits"), "--json").result())


def test_result(trained: Trained) -> None:
    int8 = trained.result["int8"]
    start = load_model_file(trained.start / "model.pt")
    assert set(int8["scores"]) == {"float", "calibrated", "distilled"}
    before = json.loads((trained.start / "result.json").read_text())
    assert int8["scores"]["float"] == pytest.approx(before["models"]["student"]["test_score"])
    for other in ("float", "calibrated"):
        against = int8[f"against_{other}"]
        assert against["other"] == int8["scores"][other]
        assert against["difference"] == pytest.approx(against["best"] - against["other"])
        assert against["standard_error"] > 0
    assert int8["against_float"]["line"].startswith("int8 after distillation against float: ")
    # the same model with other weights, and a tenth of the settings that are not given
    assert trained.file.state_dict.keys() == start.state_dict.keys()
    assert trained.file.ranges
    assert not start.ranges
    curve = journal(Path(trained.result["run"]))
    assert len(curve) == EPOCHS
    assert {"loss_task", "loss_kd", "loss_vertex"} <= curve[0].keys()


def test_exported_file_has_the_score_of_the_run(
    trained: Trained, raygkd: Start, tmp_path: Path
) -> None:
    out = tmp_path / "int8.onnx"
    written = ("export", trained.result["run"], "--format", "onnx", "--quantize", "int8")
    exported = raygkd(*written, "--max-drop", "100", "--out", out, "--json").result()
    assert exported["int8"]["trained_ranges"]
    assert exported["int8"]["calibrated_on"] is None
    assert exported["int8"]["float_layers"] == []
    scored = raygkd("evaluate", trained.result["run"], out, "--json").result()["models"]
    scores = trained.result["int8"]["scores"]
    assert scored[str(out)]["scores"]["score"] == pytest.approx(scores["distilled"])


def test_killed_run_is_resumed_bit_for_bit(trained: Trained, raygkd: Start) -> None:
    folder = trained.start.parent / "train-killed"
    command = raygkd(*options(trained.start, "killed"))
    command.until(lambda: (folder / "metrics.jsonl").exists() and journal(folder))
    command.stop(signal.SIGKILL)
    assert 0 < len(journal(folder)) < EPOCHS
    resumed = raygkd(*options(trained.start, "killed"), "--json").result()
    assert journal(folder) == journal(Path(trained.result["run"]))
    weights = load_model_file(Path(resumed["model"])).state_dict
    assert all(torch.equal(weights[name], one) for name, one in trained.file.state_dict.items())
    assert resumed["int8"]["scores"] == trained.result["int8"]["scores"]


def test_two_workers(trained: Trained, raygkd: Start) -> None:
    result = raygkd(*options(trained.start, "by-two", "--workers", "2"), "--json").result()
    [*_, last] = journal(Path(result["run"]))
    assert last["workers"] == 2
    [*_, alone] = journal(Path(trained.result["run"]))
    # the same batches, but in halves
    assert last["train_loss"] == pytest.approx(alone["train_loss"], rel=0.05)
