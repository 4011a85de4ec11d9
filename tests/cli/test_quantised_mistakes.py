"""What ``raygkd train --start-from RUN --quantize int8`` refuses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from outcomes import CLASSES, Ran

from raygkd.assembly.models import untrained_file
from raygkd.config import Config, to_yaml, with_settings
from raygkd.data.spec import ImageSpec
from raygkd.models import save_model_file

Refused = Callable[..., str]
Run = Callable[..., Path]
INT8 = ("--quantize", "int8")


@pytest.fixture
def run(tmp_path: Path, parquet: Callable[..., Path]) -> Run:
    """Return a function that writes a finished run with some settings."""
    names = tuple(f"class-{number}" for number in range(CLASSES))
    spec = ImageSpec(class_names=names, image_size=(16, 16), mean=(0.5,) * 3, std=(0.25,) * 3)
    teacher = tmp_path / "teacher.pt"
    save_model_file(teacher, untrained_file("resnet8", spec))
    data = {"dataset": "parquet", "data_dir": str(parquet()), "image_size": 16, "batch_size": 8}

    def write(command: str = "train", **settings: Any) -> Path:
        folder = tmp_path / "output" / "runs" / f"{command}-finished"
        folder.mkdir(parents=True)
        given = {**data, "teacher": str(teacher), "output": str(tmp_path / "output"), **settings}
        config = with_settings(Config(), given)
        (folder / "config.yaml").write_text(to_yaml(config))
        (folder / "facts.json").write_text("{}")
        row = {"model": config.model.student, "parameters": 1, "test_score": 0.5}
        role = "teacher" if command == "teacher" else "student"
        result = {
            "seconds": 1.0,
            "mlflow": {"tracking_uri": "sqlite:///x", "run_id": "1"},
            "models": {role: row},
            "teacher": {"path": str(teacher)},
        }
        (folder / "result.json").write_text(json.dumps(result))
        side = config.data.image_size or 16
        if "fpn" not in config.model.student:
            size = dataclasses.replace(spec, image_size=(side, side))
            save_model_file(folder / "model.pt", untrained_file(config.model.student, size))
        return folder

    return write


def test_options_that_need_each_other(refused: Refused, run: Run) -> None:
    folder = run()
    error = refused("train", *INT8)
    assert "--quantize int8: needs --start-from; pass the folder of a finished run" in error
    error = refused("train", "--start-from", folder)
    assert f"--start-from {folder}: needs --quantize int8; add it" in error
    error = refused("train", "--start-from", folder, *INT8, "--control")
    assert "--control: with --quantize the student is compared with the one that it" in error
    error = refused("train", "--start-from", folder, *INT8, "--method", "prg")
    assert "--quantize int8: --method prg reads the weights of the last layer" in error


def test_runs_that_do_not_suit(refused: Refused, run: Run, tmp_path: Path) -> None:
    error = refused("train", "--start-from", tmp_path / "gone", *INT8)
    assert f"--start-from {tmp_path}/gone: has no config.yaml" in error
    folder = run()
    (folder / "model.pt").rename(tmp_path / "moved.pt")
    error = refused("train", "--start-from", folder, *INT8)
    assert f"--start-from {folder}: its model.pt is gone; pass the folder of" in error
    (tmp_path / "moved.pt").rename(folder / "model.pt")
    (tmp_path / "teacher.pt").unlink()
    error = refused("train", "--start-from", folder, *INT8)
    assert f"the file of its teacher, {tmp_path}/teacher.pt, is gone; pass another" in error
    (folder / "result.json").unlink()
    error = refused("train", "--start-from", folder, *INT8)
    assert f"--start-from {folder}: the run is not finished" in error


def test_runs_of_other_models(refused: Refused, run: Run) -> None:
    folder = run("teacher", student="resnet8")
    error = refused("train", "--start-from", folder, *INT8)
    assert f"--start-from {folder}: has no student; pass" in error
    folder = run(student="retinanet_mobilenet_v3_small_fpn")
    error = refused("train", "--start-from", folder, *INT8)
    assert (
        "its student retinanet_mobilenet_v3_small_fpn is a detector, and only classifiers" in error
    )


def test_transformers(raygkd: Callable[..., Ran], run: Run) -> None:
    """Their operators are known once the student is exported."""
    folder = run(student="timm:test_vit", image_size=32, method="none")
    ran = raygkd("train", "--start-from", folder, *INT8)
    assert (ran.code, ran.out) == (2, "")
    error = ran.err.splitlines()[-1]
    assert "--quantize int8: timm:test_vit has operators that cannot be trained in" in error
    assert "LayerNormalization" in error
