"""What is refused of images without labels, in one line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from outcomes import Ran, png

from raygkd.assembly.models import untrained_file
from raygkd.data.prepare import prepare
from raygkd.data.sources import open_source
from raygkd.data.spec import ImageSpec
from raygkd.models import load_model_file, save_model_file

Refused = Callable[..., str]
TEACHER = ("--teacher", "timm:test_resnet", "--student", "resnet8")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of 24 images."""
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(24):
        (root / f"{number}.png").write_bytes(png(number))
    return root


@pytest.fixture
def shards(photos: Path, tmp_path: Path) -> Path:
    """The same images as Parquet, which need not be prepared."""
    path = tmp_path / "shards"
    prepare(open_source("unlabelled", photos), str(path))
    return path


@pytest.fixture
def alone(shards: Path, tmp_path: Path) -> tuple[str, ...]:
    """The options of a run without labels in which nothing is wrong."""
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "teacher.pth")
    weights = ("--teacher-weights", str(tmp_path / "teacher.pth"))
    return ("--unlabelled", str(shards), *TEACHER, *weights, "--batch-size", "8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "dkd"), "--method dkd: reads the labels of all images, but some have none ("),
        (("--method", "none"), "--method none: reads the labels of all images, but some have none"),
        (("--method", "kd"), "the class names of timm:test_resnet are not known; pass --teach"),
        (("--method", "kd", "--teacher-mode", "features"), "reads the teacher's logits, which --"),
        (("--teacher-mode", "probe"), "--teacher-mode probe: trains on labels, but no image has o"),
        (
            ("--teacher-weights", "none"),
            "--teacher timm:test_resnet: its weights are random, and i",
        ),
        (("--class-weights", "balanced"), "--class-weights: applies to labels, but no image has o"),
        (("--task-weight", "0.5"), "--task-weight: applies to labels, but no image has one; omit"),
        (
            ("--score", "accuracy"),
            "--score accuracy: is not a score for images without labels (allow",
        ),
        (("--score", "agreement"), "--score agreement: compares classes, but --method graph"),
        (
            ("--unlabelled-share", "0"),
            "--unlabelled-share 0: no image has a label, so none would be",
        ),
        (("--unlabelled", ""), "--unlabelled '': is empty; omit it, or pass a value"),
        (("--unlabelled", __file__), "must be a folder with images, or Parquet"),
        (("--val-fraction", "0.1"), "24 images without labels are too few: 2 for validation, whi"),
        (("--batch-size", "64"), "20 training images are too few for one step of 1 x 64"),
        (("--student", "fcos_resnet18_fpn16"), "fcos_resnet18_fpn16 is a detector, but the image"),
        (
            ("--unlabelled", "missing"),
            "--unlabelled 'missing': no such file or folder; pass one with",
        ),
    ],
)
def test_a_run_without_labels(
    refused: Refused, alone: tuple[str, ...], options: tuple[str, ...], message: str
) -> None:
    assert message in refused("train", *alone, "--val-fraction", "0.17", *options)


def test_commands_that_need_labels(refused: Refused, alone: tuple[str, ...]) -> None:
    for command in (("compare", *alone), ("teacher", "--dataset", "unlabelled")):
        assert f"raygkd {command[0]}: needs images with labels; add --data-dir" in refused(*command)
    assert "--repeat: applies to labels, but no image has one" in refused(
        "tune", *alone, "--repeat", "1"
    )


def test_a_flat_folder_looks_unlabelled(refused: Refused, photos: Path) -> None:
    error = refused("train", "--data-dir", photos)
    assert f"it looks unlabelled; train without labels with --unlabelled {photos}" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "dkd"), "--method dkd: reads the labels of all images, but some have none ("),
        (
            ("--unlabelled-share", "0.01"),
            "--unlabelled-share 0.01: is 0 of the 8 images of a worke",
        ),
        (("--unlabelled-share", "1.5"), "--unlabelled-share 1.5: must be at least 0 and at most 1"),
        (
            ("--score", "cka"),
            "--score cka: is not a score for classification, the task of these ima",
        ),
        (
            ("--unlabelled-share", "1", "--score", "accuracy"),
            "--score accuracy: reads the student's last layer, which --method graph does not train",
        ),
        (
            ("--unlabelled-share", "1", "--class-weights", "balanced"),
            "--class-weights: applies to labels, but --unlabelled-share 1 trains on none",
        ),
    ],
)
def test_a_run_beside_labelled_images(
    refused: Refused,
    good: tuple[str, ...],
    shards: Path,
    options: tuple[str, ...],
    message: str,
) -> None:
    assert message in refused("train", *good, "--unlabelled", shards, *options)


def test_a_share_of_nothing(refused: Refused, good: tuple[str, ...]) -> None:
    error = refused("train", *good, "--unlabelled-share", "1")
    assert "--unlabelled-share 1: there are no images without labels; add --unlabelled" in error


def test_detection_has_no_images_without_labels(refused: Refused, photos: Path) -> None:
    error = refused("train", "--dataset", "digits-voc", "--unlabelled", photos)
    assert "--unlabelled: applies to classification only, and these images have boxes" in error


@pytest.mark.parametrize("command", ["evaluate", "predict", "export", "teacher"])
def test_a_model_without_classes(
    refused: Refused,
    parquet: Callable[..., Path],
    good: tuple[str, ...],
    photos: Path,
    tmp_path: Path,
    command: str,
) -> None:
    path = tmp_path / "bare.pt"
    spec = ImageSpec(class_names=(), image_size=(12, 12), mean=(0.5,) * 3, std=(0.2,) * 3)
    save_model_file(path, untrained_file("resnet8", spec))
    run = {
        "evaluate": ("evaluate", path, *good),
        "predict": ("predict", path, photos),
        "export": ("export", path, "--format", "onnx", "--out", tmp_path / "model.onnx"),
        "teacher": ("train", *good, "--teacher", path),
    }[command]
    error = refused(*run)
    wanted = "resnet8 has no classes, since it learned feature maps without labels: train it with"
    if command == "teacher":
        wanted = f"--teacher {path}: it has no classes, since it learned only feature maps; "
    assert wanted in error


def test_what_is_prepared_and_described(
    raygkd: Callable[..., Ran], photos: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    ran = raygkd("data", "prepare", "--data-dir", photos, "--output", shards)
    assert (ran.code, "data set: unlabelled (only images in " in ran.err) == (0, True)
    assert ran.out.startswith("24 images without labels (train 24, val 0, test 0) in 1 shard(s)")
    assert f"next: raygkd tune --unlabelled {shards} --teacher NAME --student NAME" in ran.out
    for path in (photos, shards):
        ran = raygkd("data", "info", path, "--sheet", tmp_path / "sheet.png")
        assert ran.code == 0, ran.err
        assert "without a label  24" in ran.out
        assert "classes" not in ran.out


def test_a_model_without_classes_starts_a_training(tmp_path: Path) -> None:
    spec = ImageSpec(class_names=(), image_size=(12, 12), mean=(0.5,) * 3, std=(0.2,) * 3)
    bare = untrained_file("resnet8", spec)
    assert bare.class_names == ()
    save_model_file(tmp_path / "bare.pt", bare)
    from raygkd.assembly.models import new_model, start_from_weights
    from raygkd.config import Config, with_settings

    config = with_settings(
        Config(), {"student": "resnet8", "student_weights": str(tmp_path / "bare.pt")}
    )
    student = new_model("resnet8", dataclasses.replace(spec, class_names=("a", "b")))
    loaded = start_from_weights(config, student, 2)
    assert loaded is not None
    assert not loaded.is_whole
    own, given = student.state_dict(), load_model_file(tmp_path / "bare.pt").state_dict
    same = [name for name in own if torch.equal(own[name], given.get(name, torch.zeros(0)))]
    assert len(same) >= len(own) - 2
