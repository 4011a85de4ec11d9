"""``raygkd export``: what it writes and tells, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from outcomes import Ran, files

from raygkd.deploy.model import load_model
from raygkd.models import load_model_file, save_model_file
from raygkd.report.console import stderr_console
from raygkd.storage.atomic_files import place
from raygkd.tracking.store import connect, default_uri
from raygkd.workflows.model_images import own_images

Refused = Callable[..., str]
NAMES = ("class-0", "class-1", "class-2")


def test_onnx_of_int8_is_measured_on_the_images_that_are_given(
    raygkd: Callable[..., Ran], model_file: Callable[..., Path], parquet: Callable[..., Path]
) -> None:
    source = model_file(*NAMES)
    out = source.parent / "small.onnx"
    ran = raygkd(
        *("export", source, "--format", "onnx", "--quantize", "int8", "--out", out),
        *("--data", parquet(cut_off=[7]), "--json"),
    )
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    assert (result["opset"], result["parameters"]) == (18, 272_019)
    assert result["check"]["largest"] <= 1e-4
    assert result["check"]["sample_images"] == result["int8"]["images"] > 0
    for name in ("agreement", "score", "score_before"):
        assert 0 <= result["int8"][name] <= 1
    assert result["bytes"] == out.stat().st_size < 0.5 * result["int8"]["bytes_before"]
    facts, _ = load_model(place(out))
    assert facts.class_names == NAMES


def test_weights_and_card_of_a_run(
    raygkd: Callable[..., Ran], model_file: Callable[..., Path], tmp_path: Path
) -> None:
    """MODEL is the folder of a run, whose result has the scores on the test split."""
    source = model_file(*NAMES)
    run = tmp_path / "run"
    run.mkdir()
    source.rename(run / "model.pt")
    models = {"teacher": {"test_score": 0.75}, "student": {"test_score": 0.5}}
    (run / "result.json").write_text(json.dumps({"models": models}))
    before = files(tmp_path)
    ran = raygkd("export", run, "--format", "safetensors", "--out", tmp_path / "model.safetensors")
    assert ran.code == 0, ran.err
    new = {tmp_path / "model.safetensors", tmp_path / "model.md"}
    assert files(tmp_path) - before == new
    card = (tmp_path / "model.md").read_text()
    assert "license: unknown\n" in card
    assert "| test score, student | 0.5000 |" in card
    assert "largest difference 0.0e+00" in ran.out
    assert "random alone: the model file does not name its data" in " ".join(ran.out.split())


def test_images_have_the_size_of_the_student_where_its_teacher_had_larger_ones(
    model_file: Callable[..., Path], parquet: Callable[..., Path], tmp_path: Path
) -> None:
    """Exported models take images of one size only."""
    data = {"dataset": "parquet", "data_dir": str(parquet()), "teacher_image_size": 12}
    file = dataclasses.replace(
        load_model_file(model_file(*NAMES)),
        image_size=(8, 8),
        config=yaml.safe_dump({"data": data, "output": {"output": str(tmp_path)}}),
    )
    assert own_images(file, stderr_console()).spec.view == (8, 8)


@pytest.mark.parametrize(
    ("format", "name", "message"),
    [
        ("onnx", "model.pt2", "--out {}/model.pt2: must end with .onnx"),
        ("torch", "model.pt", "model.pt: must end with .pt2"),
        ("onnx", "no/model.onnx", "there is no folder '{}/no': create it first"),
        ("onnx", "/proc/model.onnx", "--out: '/proc' cannot be written (No such file"),
    ],
)
def test_wrong_places(
    refused: Refused,
    model_file: Callable[..., Path],
    tmp_path: Path,
    format: str,
    name: str,
    message: str,
) -> None:
    out = tmp_path / name
    error = refused("export", model_file(*NAMES), "--format", format, "--out", out)
    assert message.format(tmp_path) in error


def test_wrong_models(refused: Refused, tmp_path: Path, parquet: Callable[..., Path]) -> None:
    out = ("--format", "onnx", "--out", tmp_path / "model.onnx")
    assert "no such file: give one written by" in refused("export", tmp_path / "no.pt", *out)
    assert "the folder has no model.pt" in refused("export", tmp_path, *out)
    assert "is damaged or no model file" in refused("export", parquet(), *out)
    error = refused("export", "models:/nobody@champion", *out)
    assert "MODEL models:/nobody@champion: " in error
    assert "not found" in error
    error = refused("export", "models:/nobody", *out)
    assert "must be models:/NAME@ALIAS or models:/NAME/VERSION" in error
    error = refused("export", "models:/nobody/1", "--output", tmp_path / "none", *out)
    assert "there is no MLflow store at sqlite:///" in error


def test_wrong_images(
    refused: Refused,
    model_file: Callable[..., Path],
    parquet: Callable[..., Path],
    tmp_path: Path,
) -> None:
    source = model_file("cat", "dog")
    out = ("--format", "torch", "--out", tmp_path / "model.pt2")
    error = refused("export", source, *out, "--data", parquet())
    assert "it knows 2 classes (cat, dog) but the data has 3 classes" in error
    error = refused("export", source, *out, "--data", tmp_path / "no.parquet")
    assert "no file or folder" in error
    error = refused("export", source, *out, "--quantize", "int8")
    assert "--quantize int8: needs --format onnx, not torch" in error


def test_weights_of_another_model_leave_nothing(
    refused: Refused, model_file: Callable[..., Path], tmp_path: Path
) -> None:
    source = model_file(*NAMES)
    model = load_model_file(source)
    model.state_dict.popitem()
    save_model_file(source, model)
    out = ("--format", "safetensors", "--out", tmp_path / "model.safetensors")
    assert "do not fit 'resnet20' with 3 classes" in refused("export", source, *out)


def test_package_that_is_not_installed(
    refused: Refused,
    model_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # as good as not there, for whoever imports or looks for it
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    source = model_file(*NAMES)
    error = refused("export", source, "--format", "onnx", "--out", tmp_path / "model.onnx")
    assert error == "error: --format onnx: needs onnxscript: pip install 'raygkd[export]'\n"


def test_registered_model_is_the_file_of_its_run(
    raygkd: Callable[..., Ran],
    model_file: Callable[..., Path],
    tmp_path: Path,
    workplace: Path,
) -> None:
    """In a store of its own: a version, an alias, and the folder that the run's tag names."""
    # to make one takes seconds
    shutil.copy(workplace / "raygkd-output" / "mlflow.db", tmp_path)
    uri = default_uri(tmp_path)
    experiment = connect(uri, "raygkd", tmp_path)
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    run = client.create_run(experiment, tags={"raygkd.folder": str(tmp_path / "run")})
    client.create_registered_model("pets")
    client.create_model_version("pets", "file:///nowhere", run_id=run.info.run_id)
    client.set_registered_model_alias("pets", "champion", "1")
    command = ("--output", tmp_path, "--format", "safetensors")
    command += ("--out", tmp_path / "a.safetensors")
    ran = raygkd("export", "models:/pets@champion", *command)
    assert (ran.code, ran.out) == (2, "")
    assert f"its run's folder {tmp_path}/run no longer has model.pt" in ran.err
    source = model_file(*NAMES)
    (tmp_path / "run").mkdir()
    source.rename(tmp_path / "run" / "model.pt")
    for name in ("models:/pets@champion", "models:/pets/1"):
        ran = raygkd("export", name, *command, "--json")
        assert json.loads(ran.out)["source"] == f"{tmp_path}/run/model.pt"
    assert "not found" in raygkd("export", "models:/pets@nobody", *command).err
