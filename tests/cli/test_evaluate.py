"""``raygkd evaluate``: what it finds of models in every format, draws, and tells MLflow."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from labelled import TEST, labelled_by
from lively import CLASSES, classifier_file, detector_file
from mlflow import MlflowClient
from outcomes import Ran, png

from raygkd.config import Config, to_yaml, with_settings
from raygkd.data.footers import FOREIGN_CLASSES_KEY
from raygkd.deploy.exporters.onnx import write_onnx
from raygkd.models import build_from_file, count_parameters, save_model_file
from raygkd.tracking.store import connect, default_uri
from raygkd.tracking.tags import EVALUATED_TAG

Refused = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, workplace: Path) -> tuple[Path, MlflowClient, str]:
    """The folder of a finished run with its classifier, the store that has it, and its run."""
    shutil.copy(workplace / "raygkd-output" / "mlflow.db", tmp_path)
    uri = default_uri(tmp_path)
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    run_id = client.create_run(connect(uri, "raygkd", tmp_path)).info.run_id
    folder = tmp_path / "run"
    folder.mkdir()
    save_model_file(folder / "model.pt", classifier_file())
    result = {"seconds": 1.0, "mlflow": {"tracking_uri": uri, "run_id": run_id}}
    (folder / "result.json").write_text(json.dumps(result))
    return folder, client, run_id


def test_classifiers_in_every_format_side_by_side(
    raygkd: Callable[..., Ran], run: tuple[Path, MlflowClient, str], tmp_path: Path
) -> None:
    folder, client, run_id = run
    right, other = classifier_file(), classifier_file("resnet14")
    save_model_file(tmp_path / "other.pt", other)
    write_onnx(right, tmp_path / "right.onnx")
    data = labelled_by(right, tmp_path / "images.parquet")
    # the images are those that the first model was trained on
    settings = {"dataset": "parquet", "data_dir": str(data), "output": str(tmp_path)}
    named = dataclasses.replace(right, config=to_yaml(with_settings(Config(), settings)))
    save_model_file(folder / "model.pt", named)
    names = [str(folder), str(tmp_path / "right.onnx"), str(tmp_path / "other.pt")]
    options = ("--batch-size", "16", "--output", tmp_path, "--out", tmp_path / "drawn", "--json")
    ran = raygkd("evaluate", *names, *options)
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    assert (result["images"], result["measure"]) == (TEST, "accuracy")
    assert result["data"] == str(data)
    of_run, of_onnx, of_other = (result["models"][name] for name in names)
    for one in (of_run, of_onnx):
        assert one["scores"]["score"] == 1
        assert set(one["scores"]["per_class"]) <= {1.0, None}
        assert sum(row[label] for label, row in enumerate(one["confusion"])) == TEST
        assert one["calibration"]["ece"] == pytest.approx(
            1 - sum(b["confidence"] * b["count"] for b in one["calibration"]["bins"]) / TEST
        )
    assert of_other["scores"]["score"] < 1
    assert sum(map(sum, of_other["confusion"])) == TEST
    for name, model_file in zip((names[0], names[2]), (right, other)):
        one = result["models"][name]
        assert one["parameters"] == count_parameters(build_from_file(model_file))
        assert one["memory_mb"]["16"] > one["memory_mb"]["1"] > 4 * one["parameters"] / 2**20
    assert of_other["flops"] > of_run["flops"] > 0
    assert (of_onnx["flops"], of_onnx["parameters"], of_onnx["memory_mb"]) == (None, None, None)
    for one in result["models"].values():
        assert set(one["latency_ms"]) == {"1", "16"}
        assert all(0 < of["median"] <= of["p95"] for of in one["latency_ms"].values())
    drawn = ["confusion-1", "confusion-2", "confusion-3", "per-class", "reliability"]
    assert sorted(path.stem for path in (tmp_path / "drawn").iterdir()) == drawn
    assert of_onnx["mlflow"] is of_other["mlflow"] is None
    recorded = client.get_run(of_run["mlflow"]["run_id"])
    assert recorded.info.status == "FINISHED"
    assert recorded.data.tags[EVALUATED_TAG] == of_run["mlflow"]["of_run"] == run_id
    assert recorded.data.metrics["test_score"] == 1
    assert recorded.data.metrics["test_ece"] == of_run["calibration"]["ece"]
    sent = {file.path for file in client.list_artifacts(recorded.info.run_id)}
    assert sent == {"confusion-1.png", "per-class.png", "reliability.png"}


def test_a_detector(raygkd: Callable[..., Ran], tmp_path: Path) -> None:
    save_model_file(tmp_path / "model.pt", detector_file("ssdlite"))
    rows = 9
    table = pa.table(
        {
            "image": [png(row, 64) for row in range(rows)],
            "boxes": [[[4.0, 4.0, 40.0, 50.0]]] * rows,
            "labels": [[row % len(CLASSES)] for row in range(rows)],
        }
    )
    names = {FOREIGN_CLASSES_KEY: ",".join(CLASSES)}
    pq.write_table(table.replace_schema_metadata(names), tmp_path / "images.parquet")
    options = ("--dataset", "parquet", "--data-dir", tmp_path / "images.parquet")
    options += ("--batch-size", "1", "--output", tmp_path, "--split", "train")
    ran = raygkd("evaluate", tmp_path / "model.pt", *options)
    assert ran.code == 0, ran.err
    rows_shown = [" ".join(line.split()) for line in ran.out.splitlines()]
    assert any(row.startswith("map50 ") for row in rows_shown)
    assert any(row.startswith("calibration error ") for row in rows_shown)
    assert any(row.startswith("dog ") for row in rows_shown)
    assert not list(tmp_path.rglob("*.png"))


def test_what_cannot_be_evaluated(
    refused: Refused, good: tuple[str, ...], model_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = model_file("class-0", "class-1", "class-2")
    error = refused("evaluate", path)
    assert "MODEL: no model file records its training data; pass --dataset" in error
    assert "cannot be created: " in refused("evaluate", path, "--out", Path(path) / "b")
    assert "must be a local folder" in refused("evaluate", path, "--out", "s3://a/b")
    larger = tmp_path / "larger.pt"
    save_model_file(larger, classifier_file(side=16))
    error = refused("evaluate", path, larger, *good)
    assert (
        f"the models take images of different sizes ({path} 12, stretch, {larger} 16, stretch)"
        in error
    )
    (tmp_path / "weights.safetensors").write_bytes(b"")
    error = refused("evaluate", tmp_path / "weights.safetensors", *good)
    assert "contains weights only; use the model file" in error
