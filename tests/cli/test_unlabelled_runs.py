"""Runs on images without labels, from the command line to the files that they leave."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from outcomes import Ran
from shown_blocks import run_by

from raygkd.data.parquet import open_table
from raygkd.data.sklearn_digits import load_digits
from raygkd.data.sources import encode_png
from raygkd.models import build_from_file, load_model_file
from raygkd.tracking.store import connect, default_uri

Raygkd = Callable[..., Ran]
SIZES = ("--image-size", "16", "--teacher-image-size", "32", "--batch-size", "32")
CLASSES = tuple(f"digit {number}" for number in range(10))


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs without labels, a few with labels, and weights of a teacher."""
    root = tmp_path_factory.mktemp("given")
    digits = load_digits()
    (root / "photos" / "more").mkdir(parents=True)
    for number, image_HW in enumerate(digits.images_BHW[:160]):
        folder = root / "photos" / ("more" if number % 2 else "")
        (folder / f"{number}.png").write_bytes(encode_png(image_HW))
    for number in range(200, 320):
        folder = root / "few" / CLASSES[digits.label[number]]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(encode_png(digits.images_BHW[number]))
    torch.manual_seed(0)
    teacher = timm.create_model("test_resnet", num_classes=10)
    torch.save(teacher.state_dict(), root / "teacher.pth")
    (root / "names.txt").write_text("\n".join(CLASSES))
    return root


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with an MLflow store, which takes seconds to make."""
    folder = tmp_path_factory.mktemp("output")
    connect(default_uri(folder), "raygkd", folder)
    return folder


@pytest.fixture
def options(given: Path, output: Path) -> tuple[str, ...]:
    """The options of a run of 2 epochs with the teacher."""
    teacher = ("--teacher", "timm:test_resnet", "--teacher-weights", str(given / "teacher.pth"))
    run = ("--student", "resnet8", "--epochs", "2", "--output", str(output))
    return (*teacher, *run, *SIZES, "--json")


def result(ran: Ran) -> dict[str, Any]:
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


def metrics(found: dict[str, Any]) -> list[dict[str, float]]:
    """Return the metrics of each epoch of a run."""
    return [
        json.loads(line) for line in Path(found["run"], "metrics.jsonl").read_text().splitlines()
    ]


def test_without_labels_and_then_with_few(
    raygkd: Raygkd, given: Path, options: tuple[str, ...], tmp_path: Path
) -> None:
    found = result(raygkd("train", "--unlabelled", given / "photos", *options))
    assert found["score"] == "cka"
    assert found["models"]["student"]["test_score"] is None
    epochs = metrics(found)
    assert [epoch["val_score"] for epoch in epochs] == [epoch["val_cka"] for epoch in epochs]
    assert found["val_score"] == epochs[-1]["val_cka"]
    assert "train_accuracy" not in epochs[0]
    model = load_model_file(found["model"])
    assert model.class_names == ()
    # what was learned is what the next training starts from
    ran = raygkd(
        "train", "--data-dir", given / "few", *options, "--method", "none",
        "--student-weights", found["model"],
    )  # fmt: skip
    assert "classifier starts at random for this number of classes" in ran.err
    labelled = result(ran)
    assert load_model_file(labelled["model"]).class_names == CLASSES
    report = tmp_path / "page.html"
    ran = raygkd("report", found["run"], "--html", report)
    assert ran.code == 0, ran.err
    assert "Right and wrong: the images have no labels." in ran.out
    assert "unlabelled 144" in report.read_text()


def test_a_student_gets_the_classes_of_its_teacher(
    raygkd: Raygkd, given: Path, options: tuple[str, ...]
) -> None:
    names = ("--teacher-classes", given / "names.txt", "--method", "kd")
    ran = raygkd("train", "--unlabelled", given / "photos", *options, *names)
    found = result(ran)
    assert found["score"] == "agreement"
    assert 0 <= found["val_score"] <= 1
    model = load_model_file(found["model"])
    assert model.class_names == CLASSES
    assert build_from_file(model)(torch.rand(1, 3, 16, 16)).shape == (1, 10)
    shown = raygkd("predict", found["model"], given / "photos" / "0.png")
    assert json.loads(shown.out)["predictions"][0]["class"] in CLASSES


@pytest.mark.parametrize("mode", ["features", "as-is"])
def test_beside_labelled_images(
    raygkd: Raygkd, given: Path, options: tuple[str, ...], mode: str
) -> None:
    more = ("--teacher-mode", mode)
    if mode == "as-is":
        more += ("--teacher-classes", str(given / "names.txt"), "--method", "graph+kd")
    found = result(
        raygkd(
            "train", "--data-dir", given / "few", "--unlabelled", given / "photos", *options, *more
        )
    )
    assert found["models"]["student"]["test_score"] is not None
    for epoch in metrics(found):
        assert 0 <= epoch["train_accuracy"] <= 1
        assert epoch["val_score"] == epoch["val_accuracy"]
        # 160 images without labels, 16 to a batch of 32
        assert epoch["images_per_second"] * epoch["epoch_seconds"] > 300
    facts = json.loads(Path(found["run"], "facts.json").read_text())
    assert facts["data set, unlabelled images"] == 160


def test_labelled_images_for_validation_alone(
    raygkd: Raygkd, given: Path, options: tuple[str, ...]
) -> None:
    few = ("--data-dir", given / "few", "--unlabelled", given / "photos")
    found = result(raygkd("train", *few, *options, "--unlabelled-share", "1"))
    assert found["score"] == "knn"
    assert found["models"]["student"]["test_score"] > 0.15
    for epoch in metrics(found):
        assert epoch["val_score"] == epoch["val_knn"]
        assert "train_accuracy" not in epoch
        assert "loss_task" not in epoch
    assert load_model_file(found["model"]).class_names == ()


@pytest.mark.parametrize("labelled", [False, True])
def test_two_workers(raygkd: Raygkd, given: Path, options: tuple[str, ...], labelled: bool) -> None:
    few = ("--data-dir", given / "few") if labelled else ()
    images = ("--unlabelled", given / "photos", *few)
    found = result(raygkd("train", *images, *options, "--workers", "2"))
    assert [epoch["workers"] for epoch in metrics(found)] == [2.0, 2.0]
    assert load_model_file(found["model"]).class_names == (CLASSES if labelled else ())


def test_a_search_ranks_its_trials_without_labels(
    raygkd: Raygkd, given: Path, options: tuple[str, ...]
) -> None:
    ran = raygkd("tune", "--unlabelled", given / "photos", *options[:-1], "--trials", "3")
    assert ran.code == 0, ran.err
    assert "student alone" not in ran.out
    assert "verdict" not in ran.out
    run = next(line.split()[-1] for line in ran.out.splitlines() if line.startswith("results"))
    found = json.loads(Path(run).read_text())
    assert found["selection"]["score"] == "cka"
    assert found["champion"]["role"] == "best"
    assert found["champion"]["registered"] is None
    scores = [trial["val_score"] for trial in found["trials"]]
    assert scores == sorted(scores, reverse=True)
    assert all(trial["params"].get("method", "graph") == "graph" for trial in found["trials"])
    model = load_model_file(Path(found["run"], "model.pt"))
    assert (model.class_names, model.scores["val_cka"]) == ((), scores[0])
    assert raygkd("report", found["run"]).code == 0


def test_prepared_images_are_read_as_they_are(
    raygkd: Raygkd, given: Path, options: tuple[str, ...], tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    prepared = raygkd(
        "data", "prepare", "--dataset", "unlabelled", "--data-dir", given / "photos",
        "--output", shards,
    )  # fmt: skip
    assert prepared.code == 0, prepared.err
    assert (open_table(str(shards)).labels == -1).all()
    found = result(raygkd("train", "--unlabelled", shards, *options))
    assert found["score"] == "cka"


def test_the_commands_of_the_guide(
    raygkd: Raygkd, given: Path, output: Path, tmp_path: Path
) -> None:
    """They run as the guide has them, but for weights that need no network, and smaller images."""
    [guide] = run_by("tests/cli/test_unlabelled_runs.py", "docs/guides/unlabelled.md")
    places = {"photos": str(given / "photos"), "few": str(given / "few")}
    commands = [
        [places.get(word, word.replace("raygkd-output", str(output))) for word in shlex.split(line)]
        for line in guide.code.splitlines()
    ]
    assert len(commands) == 2
    torch.manual_seed(0)
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "teacher.pth")
    small = ("--teacher-weights", tmp_path / "teacher.pth", *SIZES, "--epochs", "1", "--json")
    small += ("--output", output)
    first = result(raygkd(*commands[0][1:], *small, "--student-weights", "none"))
    assert (first["score"], load_model_file(first["model"]).class_names) == ("cka", ())
    ran = raygkd(*commands[1][1:], *small)
    assert "student weights: model.pt" in ran.err
    assert "fc starts at random for this number of classes" in ran.err
    assert load_model_file(result(ran)["model"]).class_names == CLASSES
