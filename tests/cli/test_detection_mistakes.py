"""Wrong inputs for detection: one line of what, where and what is allowed; code 2; nothing left."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from outcomes import png

from raygkd.assembly.models import untrained_file
from raygkd.config import DataConfig
from raygkd.data.run_images import shards
from raygkd.data.scenes import write_scenes
from raygkd.data.spec import ImageSpec
from raygkd.models import save_model_file

Refused = Callable[..., str]
FASTERRCNN, FCOS = "fasterrcnn_mobilenet_v3_small_fpn32", "fcos_mobilenet_v3_small_fpn32"
PAIR = ("--teacher", FASTERRCNN, "--student", FCOS)
COMMANDS = [("train", *PAIR), ("data", "prepare", "--output", "new")]
VOC, COCO = ((*COMMANDS[0], "--dataset", name, "--data-dir") for name in ("voc", "coco"))


@pytest.fixture
def refused(refused: Refused) -> Refused:
    """The fixture of that name with no CPU left to stream images: the last of what is refused."""
    guard = ("--cache-mb", "0", "--cpus-per-worker", str(os.cpu_count()))

    def run(command: str, *arguments: str | Path) -> str:
        return refused(command, *(() if command == "data" else guard), *arguments)

    return run


@pytest.fixture(scope="module")
def scenes(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The options of a run on scenes that are prepared already, in which nothing is wrong."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, images={"train": 16, "val": 4, "test": 4})
    shards(DataConfig(dataset="digits-voc", data_dir=str(folder)), workplace / "raygkd-output")
    return ("--dataset", "digits-voc", "--data-dir", str(folder), *PAIR)


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """A folder in VOC layout."""
    write_scenes(tmp_path / "voc", images={"train": 3, "test": 1})
    return tmp_path / "voc"


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """An instances file; its image 1 of 12 x 12 pixels has a dog."""
    (tmp_path / "cat.png").write_bytes(png(0))
    (tmp_path / "dog.png").write_bytes(png(1))
    contents = {
        "images": [{"id": 0, "file_name": "cat.png"}, {"id": 1, "file_name": "dog.png"}],
        "annotations": [
            {"id": 30, "image_id": 0, "category_id": 1, "bbox": [1, 1, 5, 5]},
            {"id": 31, "image_id": 1, "category_id": 2, "bbox": [2, 2, 9, 9]},
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(contents))
    return tmp_path / "instances.json"


# folders and files


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("dataset", ["voc", "coco"])
def test_folder_that_is_missing_not_given_or_of_another_layout(
    refused: Refused, tmp_path: Path, command: tuple[str, ...], dataset: str
) -> None:
    run = (*command, "--dataset", dataset)
    assert f"error: --dataset {dataset} needs --data-dir, the folder with its f" in refused(*run)
    error = refused(*run, "--data-dir", tmp_path / "gone")
    assert f"error: no folder '{tmp_path}/gone'; set --data-dir to an existing folder" in error
    layouts = {
        "voc": f"no VOC layout in '{tmp_path}': expected the folders JPEGImages and Annotations, ",
        "coco": f"no training annotations in '{tmp_path}': expected annotations/instances_train*.",
    }
    assert f"error: {layouts[dataset]}" in refused(*run, "--data-dir", tmp_path)


@pytest.mark.parametrize("command", COMMANDS)
def test_years(refused: Refused, voc: Path, command: tuple[str, ...]) -> None:
    run = (*command, "--dataset", "voc", "--data-dir", voc.parent, "--years")
    assert "error: --years '2008': must be 2007, 2012, or both" in refused(*run, "2008")
    voc.rename(voc.parent / "VOC2007")
    message = f"error: no VOC2012 in '{voc.parent}'; pass --download, or train on --years"
    assert f"{message} 2007\n" in refused(*run, "2012")


def test_lists_that_do_not_name_training_images(refused: Refused, voc: Path) -> None:
    lists = voc / "ImageSets" / "Main"
    (lists / "train.txt").write_text("elsewhere\n")
    error = refused(*VOC, voc)
    assert f"error: no usable training boxes in '{voc}': dropped 1 image without a rea" in error
    assert f"first in {voc}/Annotations/elsewhere.xml (cannot be read: No such file" in error
    (lists / "train.txt").write_text("\n")
    assert f"error: '{lists}/train.txt' lists no image: fill it or remove" in refused(*VOC, voc)
    (lists / "train.txt").unlink()
    error = refused(*VOC, voc)
    assert f"error: no train.txt or trainval.txt in '{lists}'; add one, or remove ImageSe" in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", " has no list 'images'; use a COCO instances file, which has the lists images, a"),
        ('{"images": [{"id": 1}]}', ": images[0] has no 'file_name' (a string)"),
        (
            '{"images": [], "annotations": [], "categories": []}',
            " lists no images: fill its list 'images' or remove the file",
        ),
        ('{"images": [],', " is not JSON: Expecting property name enclosed in double quotes: line"),
    ],
)
def test_json_that_is_no_coco_file(
    refused: Refused, tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "instances_train2017.json"
    path.write_text(text)
    for data_dir in (tmp_path, path):
        assert f"error: '{path}'{message}" in refused(*COCO, data_dir)


def test_classes_that_the_data_does_not_have(
    refused: Refused, coco: Path, scenes: tuple[str, ...]
) -> None:
    error = refused(*COCO, coco, "--classes", "dog,cats")
    assert "--classes 'cats': not a class of coco; did you mean 'cat'? (known: cat, dog)" in error
    error = refused("tune", *scenes, "--classes", "11")
    assert (
        "--classes '11': not a class of digits-voc; did you mean '1'? (known: 0, 1, 2, 3," in error
    )
    error = refused("train", "--dataset", "digits", "--classes", "1")
    assert "--classes: digits has no boxes; omit the option" in error


# annotations


@pytest.mark.parametrize(
    ("image_id", "tag", "value", "fault", "action"),
    [
        ("train_00001", "xmax", "0", " object 1: box with no area (", "dropped"),
        (
            "train_00001",
            "xmin",
            "abc",
            " object 1: box without four finite numbers ('abc' '",
            "dropped",
        ),
        ("train_00001", "xmax", "900", " object 1: box partly outside the image (", "clipped"),
        ("test_00000", "name", "cat", " object 1: box of an unknown class ('cat')", "dropped"),
        ("test_00000", "width", "7", ": image size different from the file's (7x", "ignored"),
        ("test_00000", "filename", "", ": image whose file is missing (", "dropped"),
    ],
)
def test_faulty_annotations_of_voc(
    refused: Refused,
    voc: Path,
    image_id: str,
    tag: str,
    value: str,
    fault: str,
    action: str,
) -> None:
    path = voc / "Annotations" / f"{image_id}.xml"
    if tag == "filename":
        (voc / "JPEGImages" / f"{image_id}.png").unlink()
    path.write_text(re.sub(f"(?<=<{tag}>).*?(?=<)", value, path.read_text(), count=1))
    error = refused(*COMMANDS[1], "--dataset", "voc", "--data-dir", voc, "--strict")
    assert error.startswith(f"error: {path}{fault}")
    assert error.endswith(f"; correct it, or omit --strict to have it {action}\n")


@pytest.mark.parametrize(
    ("right", "wrong", "fault"),
    [
        ("2, 2, 9, 9", "2, 2, 0, 9", "image 1 annotation 31: box with no area ("),
        ("2, 2, 9, 9", "2, 2, 50, 9", "image 1 annotation 31: box partly outside the image ("),
        ('"category_id": 2', '"category_id": 7', "annotation 31: box of an unknown class (cate"),
        ("dog.png", "wolf.png", "image 1: image whose file is missing ("),
    ],
)
def test_faulty_annotations_of_coco(
    refused: Refused, coco: Path, right: str, wrong: str, fault: str
) -> None:
    coco.write_text(coco.read_text().replace(right, wrong))
    error = refused(*COCO, coco, "--strict")
    assert error.startswith(f"error: {coco} {fault}")
    assert "; correct it, or omit --strict to have it " in error


# models and settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("train", "--student", "resnet8"), "--student: resnet8 is a classifier, but the images h"),
        (("tune", "--teacher", "resnet20"), "--teacher: resnet20 is a classifier, but the images "),
        (("teacher", "--teacher", "resnet20"), "--teacher: resnet20 is a classifier, but the imag"),
        (
            ("train", "--student", "fasterrcnn_resnet18_fpn50"),
            "--student: unknown detector 'fasterrcnn_resnet18_fpn50'; did you mean 'fasterrcnn_res",
        ),
        (
            ("tune", "--teacher", "retinanet-resnet18-fpn64"),
            "--teacher: unknown detector 'retinanet-resnet18-fpn64'; did you mean 'retinanet_resne",
        ),
        (("train", "--method", "kd"), "--method kd: does not support detection, the task of"),
        (
            ("tune", "--method", "graph+kd"),
            "--method graph+kd: does not support detection, the task",
        ),
        (("train", "--foreground", "1.5"), "--foreground 1.5: must be above 0 and below 1"),
        (("train", "--image-size", "100"), "--image-size 100: must be a multiple of 32 for a det"),
        (("teacher", "--image-size", "100"), "--image-size 100: must be a multiple of 32 for a d"),
        (("tune", "--augment", "crop"), "--augment 'crop': for object detection it must be one o"),
        (("tune", "--score", "map75"), "invalid value for '--score': 'map75' is not one of 'auto"),
        (
            ("train", "--data-dir", "new", "--classes", "zebra"),
            "--classes 'zebra': not a class of d",
        ),
        (("train", "--student-weights", "imagent"), "--student-weights: cannot read weights image"),
        (("teacher", "--teacher-weights", "gone.pt"), "--teacher-weights: cannot read weights go"),
    ],
)
def test_what_is_wrong_for_detection_is_told_before_images_are_prepared(
    refused: Refused, options: tuple[str, ...], message: str
) -> None:
    command, *others = options
    error = refused(command, "--dataset", "digits-voc", *PAIR, *others)
    assert error.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("train", "--levels", "9"), "has no level 9 (allowed: 3, 4, 5, 6, 7)"),
        (("train", "--levels", "2,3"), f"--levels: student {FCOS} has no level 2 (allowed: 3, 4,"),
        (("train", "--levels", "5,6"), f"--levels: teacher {FASTERRCNN} has no level 6 (allowed:"),
        (
            ("train", "--dim", "64", "--teacher", "fcos_mobilenet_v3_small_fpn64"),
            "--dim: levels 3, 4, 5, 6, 7: dim must be from 1 to 63 for a map of 64 channels",
        ),
        (
            ("tune", "--inherit"),
            "--inherit: the student cannot inherit from a teacher with different",
        ),
        (
            ("train", "--inherit", "--teacher", "fcos_mobilenet_v3_small_fpn64"),
            "--inherit: no module of the teacher's neck and heads fits the student; choose",
        ),
    ],
)
def test_settings_that_detectors_do_not_take(
    refused: Refused, scenes: tuple[str, ...], options: tuple[str, ...], message: str
) -> None:
    command, *others = options
    assert message in refused(command, *scenes, *others)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("train", "--student", FCOS), f"--student: {FCOS} is a detector, but the images have la"),
        (("tune", "--teacher", FCOS), "have labels and no boxes; choose a classifier such as res"),
        (("train", "--foreground", "0.5"), "--foreground: applies to detectors only, and these"),
        (("train", "--inherit"), "--inherit: applies to detectors only, and these images"),
        (("tune", "--student-weights", "imagenet"), "--student-weights: imagenet: is for"),
        (
            ("train", "--score", "map"),
            "--score map: is not a score for classification, the task",
        ),
        (("train", "--augment", "jitter"), "--augment 'jitter': must be one of none, crop, crop-f"),
    ],
)
@pytest.mark.parametrize("prepared", [False, True])
def test_settings_that_only_detectors_take(
    refused: Refused,
    good: tuple[str, ...],
    prepared: bool,
    options: tuple[str, ...],
    message: str,
) -> None:
    data = (*good, "--image-size", "32") if prepared else ("--dataset", "digits")
    assert message in refused(*options, *data)


def test_teacher_file_that_is_for_the_other_task_or_has_weights(
    refused: Refused, good: tuple[str, ...], model_file: Callable[..., Path], tmp_path: Path
) -> None:
    detection = ("--dataset", "digits-voc", *PAIR)
    path = model_file("cat", "dog")
    error = refused("train", *detection, "--teacher", path)
    assert error.startswith(f"error: --teacher {path}: resnet20 is a classifier, but the images ha")
    path = tmp_path / "detector.pt"
    sizes = {"image_size": (64, 64), "mean": (0.5,) * 3, "std": (0.2,) * 3}
    spec = ImageSpec(class_names=("a",), task="detection", **sizes)
    save_model_file(path, untrained_file(FCOS, spec))
    for data in (("--dataset", "digits"), good):
        error = refused("tune", *data, "--teacher", path)
        assert error.startswith(f"error: --teacher {path}: {FCOS} is a detector, but the images ha")
    error = refused("train", *detection, "--teacher", path, "--teacher-weights", path)
    assert f"error: --teacher-weights: the teacher {path} is already trained; omit it" in error


@pytest.mark.parametrize("option", ["--student-weights", "--teacher-weights"])
def test_files_that_hold_no_weights_of_detectors(
    refused: Refused, tmp_path: Path, option: str
) -> None:
    path = tmp_path / "weights.pt"
    for contents, message in (
        ([1], "is not a state dict; save one with torch.save(model.state_dict())"),
        (
            {"scale": torch.ones(1)},
            "does not contain weights of a detector, ResNet or MobileNetV3; use the weights of "
            "the detector or its backbone",
        ),
        ({"layer4.x": torch.ones(1)}, "does not fit: it lacks "),
    ):
        torch.save(contents, path)
        error = refused("train", "--dataset", "digits-voc", *PAIR, option, path)
        assert f"error: {option}: {path} {message}" in error
