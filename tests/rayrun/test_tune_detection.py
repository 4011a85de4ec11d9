"""``raygkd tune --dataset voc`` from end to end, on a small folder of scenes in VOC's layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from commands import Command
from mlflow import MlflowClient
from records import curves, running, strange_numbers

from raygkd.assembly.models import untrained_file
from raygkd.data.scenes import write_scenes
from raygkd.data.spec import ImageSpec
from raygkd.deploy.modules import DeployedDetector
from raygkd.models import load_model_file, save_model_file

SIDE, TRIALS = 96, 2
SPEC = ImageSpec(
    class_names=tuple("0123456789"),
    image_size=(SIDE, SIDE),
    mean=(0.3,) * 3,
    std=(0.2,) * 3,
    task="detection",
)
TUNE = (
    *("tune", "--dataset", "voc", "--trials", TRIALS, "--epochs", 2, "--scheduler", "none"),
    *("--student", "fcos_mobilenet_v3_small_fpn16"),
    *("--image-size", SIDE, "--batch-size", 8, "--seed", 3, "--json"),
)
MEASURES = {"val_score", "val_map", "val_map50", "val_map75", "val_ap50_voc", "val_ap50_voc07"}


@pytest.fixture(scope="module")
def result(
    raygkd: Callable[..., Command], output: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The search; its data and the teacher of random weights lie in a folder of their own."""
    folder = tmp_path_factory.mktemp("detection")
    write_scenes(folder / "voc", images={"train": 24, "val": 8, "test": 8})
    teacher = folder / "teacher.pt"
    save_model_file(teacher, untrained_file("fcos_resnet18_fpn16", SPEC))
    given = ("--teacher", teacher, "--data-dir", folder / "voc", "--output", output)
    return raygkd(*TUNE, *given).result()


def test_a_search_for_detectors_ends_with_what_one_for_classifiers_does(
    result: dict[str, Any],
) -> None:
    assert {"best", "teacher", "student_alone", "trials", "mlflow", "seconds"} <= set(result)
    for role in ("teacher", "student_alone", "best"):
        assert 0 <= result[role]["test_score"] <= 1
    assert result["teacher"]["parameters"] > 5 * result["best"]["parameters"]
    assert len(result["trials"]) == TRIALS
    assert all(trial["status"] == "finished" for trial in result["trials"])
    assert json.loads((Path(result["run"]) / "result.json").read_text()) == result


def test_every_epoch_of_a_trial_has_its_losses_and_mean_average_precisions(
    result: dict[str, Any], client: MlflowClient
) -> None:
    weights = {"alpha": "vertex", "beta": "edge", "gamma": "spectral"}
    parts = {f"loss_task_{part}" for part in ("classification", "bbox_regression", "bbox_ctrness")}
    for trial in result["trials"]:
        found = curves(client, trial["run_id"])
        used = [term for weight, term in weights.items() if trial["params"][weight]]
        losses = {"loss_task", *(f"loss_{term}" for term in used)}
        for name in MEASURES | losses | parts:
            assert set(found[name]) == set(range(1, trial["epochs"] + 1)), name
        assert found["val_score"] == found["val_map50"]


def test_detections_and_scores_by_class_are_drawn_for_the_folder_and_mlflow(
    result: dict[str, Any], client: MlflowClient, tmp_path: Path
) -> None:
    for name in ("detections.png", "per_class.png", "search.png"):
        sent = client.download_artifacts(result["mlflow"]["parent_run_id"], name, str(tmp_path))
        drawn = (Path(result["run"]) / name).read_bytes()
        assert Path(sent).read_bytes() == drawn
        assert drawn.startswith(b"\x89PNG")


def test_the_winner_is_a_registered_model_that_finds_the_same(
    result: dict[str, Any], client: MlflowClient
) -> None:
    images = np.random.default_rng(0).random((2, 3, SIDE, SIDE), dtype=np.float32)
    with torch.no_grad():
        model = DeployedDetector(load_model_file(result["model"])).eval()
        expected = model(torch.from_numpy(images)).numpy()
    assert np.array_equal(
        mlflow.pyfunc.load_model(result["champion"]["model_uri"]).predict(images), expected
    )


def test_no_run_is_left_open_and_no_number_is_strange(
    result: dict[str, Any], client: MlflowClient, output: Path
) -> None:
    assert running(client) == []
    assert strange_numbers(output) == []
