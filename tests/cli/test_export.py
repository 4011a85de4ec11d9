"""``raygkd export``: what it writes and tells, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from lively import CLASSES, classifier_file
from mlflow import MlflowClient
from outcomes import ROWS, Ran, files, png

from raygkd.assembly.models import untrained_file
from raygkd.data.decoding import decode
from raygkd.data.spec import ImageSpec
from raygkd.deploy.model import load_model
from raygkd.models import load_model_file, save_model_file
from raygkd.report.console import stderr_console
from raygkd.storage.atomic_files import place
from raygkd.tracking.store import connect, default_uri
from raygkd.workflows.model_images import given_images, own_images
from raygkd.workflows.quantise import calibration_images

Refused = Callable[..., str]
NAMES = ("class-0", "class-1", "class-2")


def test_int8_is_calibrated_and_measured_on_the_images_that_are_given(
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
    int8 = result["int8"]
    assert (result["opset"], result["parameters"]) == (18, 272_019)
    assert result["check"]["largest"] <= 1e-4
    assert result["check"]["sample_images"] == int8["images"] > 0
    for name in ("agreement", "score", "score_before"):
        assert 0 <= int8[name] <= 1
    # training images alone
    assert 16 <= int8["calibrated_on"] <= ROWS - 1 - 2 * int8["images"]
    assert (int8["kind"], int8["layers"], int8["measure"]) == ("int8", 22, "accuracy")
    assert int8["score_before"] - int8["score"] <= 0.005
    assert all(int8["latency_ms"][name]["median"] > 0 for name in ("float32", "int8"))
    assert result["bytes"] == out.stat().st_size < 0.5 * int8["bytes_before"]
    facts, _ = load_model(place(out))
    assert facts.class_names == NAMES


def test_calibration_images_are_a_sample_of_the_training_images(
    model_file: Callable[..., Path], parquet: Callable[..., Path]
) -> None:
    file = load_model_file(model_file(*NAMES))
    images = given_images(file, str(parquet(cut_off=[7])), stderr_console())
    train = set(images.rows["train"].tolist())
    samples = [calibration_images(images, 20) for _ in range(2)]
    rows = [sample.rows.tolist() for sample in samples]
    assert rows[0] == rows[1]
    assert set(rows[0]) < train - {7}
    assert len(rows[0]) in (19, 20)
    assert max(rows[0]) - min(rows[0]) > 30
    # they can be read again
    assert [sum(map(len, samples[0])) for _ in range(2)] == [len(rows[0])] * 2


def test_layers_stay_in_float_until_the_score_is_kept(
    raygkd: Callable[..., Ran], tmp_path: Path
) -> None:
    """One channel between two layers is so large that the others are lost in 8 bits."""
    model = classifier_file("resnet8")
    weight = model.state_dict["stage2.0.residual.1.weight"]
    bias = model.state_dict["stage2.0.residual.1.bias"]
    weight[0], bias[0] = 0.0, 3e4
    model.state_dict["stage2.0.residual.3.weight"][:, 0] = 0.0
    save_model_file(tmp_path / "model.pt", model)
    facts, run = load_model(place(tmp_path / "model.pt"))
    images = [png(row) for row in range(300)]
    pixels = torch.stack([torch.from_numpy(facts.prepare(decode(one))[0]) for one in images])
    columns = {"image": images, "label": run(pixels / 255).argmax(1).tolist()}
    table = pa.table(columns).replace_schema_metadata({"classes": ",".join(CLASSES)})
    pq.write_table(table, tmp_path / "images.parquet")
    command = ("export", tmp_path / "model.pt", "--format", "onnx", "--quantize", "int8")
    command += ("--data", tmp_path / "images.parquet", "--out", tmp_path / "small.onnx")
    ran = raygkd(*command, "--json")
    assert ran.code == 0, ran.err
    int8 = json.loads(ran.out)["int8"]
    assert int8["float_layers"] == ["stage2.0.residual.0", "stage2.0.residual.3"]
    assert int8["score_before"] - int8["score"] <= 0.005
    ran = raygkd(*command, "--max-drop", "100")
    assert "layers in float            0 of 10" in ran.out


def test_dynamic_needs_no_images_and_says_so_where_it_is_slower(
    raygkd: Callable[..., Ran], model_file: Callable[..., Path]
) -> None:
    source = model_file(*NAMES)
    out = source.parent / "small.onnx"
    ran = raygkd("export", source, "--format", "onnx", "--quantize", "dynamic", "--out", out)
    assert ran.code == 0, ran.err
    assert "int8, activations quantised at run time" in ran.out
    assert "ms, batch of 1, " in ran.out
    # its convolutions have no fast kernel
    assert ran.out.rstrip().splitlines()[-1].startswith("int8 is slower than float32 on this mach")


def test_wrong_quantisation(
    refused: Refused,
    model_file: Callable[..., Path],
    parquet: Callable[..., Path],
    tmp_path: Path,
) -> None:
    source, data = model_file(*NAMES), ("--data", parquet())
    (tmp_path / "small.onnx").write_text("kept")
    command = ("export", source, "--format", "onnx", "--out", tmp_path / "small.onnx")
    error = refused(*command, "--quantize", "int8")
    assert (
        "--quantize int8: needs training images: the model file does not record its data" in error
    )
    assert "pass --data, or choose --quantize dynamic" in error
    error = refused(*command, "--quantize", "int8", "--calibration-images", "9", *data)
    assert "9 training images in " in error
    assert "are too few to calibrate on, at least 16 are needed; raise --calibration-" in error
    error = refused(*command, "--quantize", "dynamic", "--max-drop", "1")
    assert error == "error: --max-drop: needs --quantize int8; omit it\n"
    error = refused(*command, "--quantize", "int8", "--max-drop", "nan")
    assert "'--max-drop': nan is not a finite number" in error
    error = refused(*command, "--calibration-images", "20", *data)
    assert error == "error: --calibration-images: needs --quantize int8; omit it\n"
    assert "needs --format onnx, not safetensors" in refused(
        *("export", source, "--format", "safetensors", "--quantize", "dynamic"),
        *("--out", tmp_path / "small.safetensors"),
    )
    assert (tmp_path / "small.onnx").read_text() == "kept"


def test_weights_and_card_of_a_run(
    raygkd: Callable[..., Ran], model_file: Callable[..., Path], tmp_path: Path
) -> None:
    """MODEL is the folder of a run, whose result has the scores on the test split."""
    source = model_file(*NAMES)
    run = tmp_path / "run"
    run.mkdir()
    source.rename(run / "model.pt")
    scores = {"teacher": 0.75, "student": 0.5}
    models = {
        role: {"model": "resnet20", "parameters": 1, "test_score": score}
        for role, score in scores.items()
    }
    result = {"seconds": 1.0, "mlflow": {"tracking_uri": "sqlite:///x"}, "models": models}
    (run / "result.json").write_text(json.dumps(result))
    before = files(tmp_path)
    ran = raygkd("export", run, "--format", "safetensors", "--out", tmp_path / "model.safetensors")
    assert ran.code == 0, ran.err
    new = {tmp_path / "model.safetensors", tmp_path / "model.md"}
    assert files(tmp_path) - before == new
    card = (tmp_path / "model.md").read_text()
    assert "license: unknown\n" in card
    assert "| test score, student | 0.5000 |" in card
    assert "largest difference 0.0e+00" in ran.out
    assert "random inputs only: the model file does not record its data" in " ".join(
        ran.out.split()
    )


def test_images_have_the_size_of_the_student_where_its_teacher_had_larger_ones(
    model_file: Callable[..., Path], parquet: Callable[..., Path], tmp_path: Path
) -> None:
    """Exported models take images of one size only."""
    data = {"dataset": "parquet", "data_dir": str(parquet()), "teacher_image_size": 12}
    # a score of students in training, which files have not
    data["score"] = "knn"
    file = dataclasses.replace(
        load_model_file(model_file(*NAMES)),
        image_size=(8, 8),
        config=yaml.safe_dump({"data": data, "output": {"output": str(tmp_path)}}),
    )
    spec = own_images(file, stderr_console()).spec
    assert (spec.view, spec.score) == ((8, 8), "accuracy")


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
    assert "no such file; pass one written by" in refused("export", tmp_path / "no.pt", *out)
    assert "the folder has no model.pt" in refused("export", tmp_path, *out)
    assert "is damaged, or not a model file" in refused("export", parquet(), *out)
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
    assert "it has 2 classes (cat, dog), but the data has 3 classes" in error
    error = refused("export", source, *out, "--data", tmp_path / "no.parquet")
    assert "no file or folder" in error
    error = refused("export", source, *out, "--quantize", "int8")
    assert "--quantize int8: needs --format executorch or onnx or openvino, not torch" in error


def test_weights_of_another_model_leave_nothing(
    refused: Refused, model_file: Callable[..., Path], tmp_path: Path
) -> None:
    source = model_file(*NAMES)
    model = load_model_file(source)
    model.state_dict.popitem()
    save_model_file(source, model)
    out = ("--format", "safetensors", "--out", tmp_path / "model.safetensors")
    assert "do not fit 'resnet20' with 3 classes" in refused("export", source, *out)


def test_operator_that_onnx_lacks(refused: Refused, tmp_path: Path) -> None:
    nets = tmp_path / "nets.py"
    nets.write_text(
        "import torch\n"
        "class Bessel(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.fc = torch.nn.Linear(432, 3)\n"
        "    def forward(self, images):\n"
        "        return torch.special.bessel_j0(self.fc(images.flatten(1)))\n"
        "def bessel(num_classes):\n"
        "    return Bessel()\n"
    )
    spec = ImageSpec(class_names=NAMES, image_size=(12, 12), mean=(0.5,) * 3, std=(0.2,) * 3)
    save_model_file(tmp_path / "model.pt", untrained_file(f"{nets}:bessel", spec))
    out = ("--format", "onnx", "--out", tmp_path / "model.onnx")
    error = refused("export", tmp_path / "model.pt", *out)
    assert "--format onnx: has no operator for prims.bessel_j0, which " in error
    assert error.endswith("bessel uses; choose --format torch\n")


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
