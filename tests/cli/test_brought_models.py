"""Models and weights that people bring, from the command line."""

from __future__ import annotations

import argparse
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import timm
import torch
from outcomes import Ran
from safetensors.torch import save_file

from raygkd.models import build_model, load_model_file

NETS = """
import torch
from torch import nn

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def net(classes):
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)),
        nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU()),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, classes)),
    )


def broken(classes):
    return net(classes) if classes == 2 else undefined


def pair(classes):
    class Pair(nn.Module):
        def forward(self, images):
            return images, images

    return Pair()
"""
DIGITS = ("--dataset", "digits", "--epochs", "1", "--limit-train", "128")


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    path = tmp_path / "nets.py"
    path.write_text(NETS)
    return path


def weights(nets: Path, classes: int, name: str = "weights.pth") -> Path:
    """Save weights of the function's model as a training script does; return their path."""
    torch.manual_seed(0)
    state = build_model(f"{nets}:net", classes, (8, 8)).state_dict()
    path = nets.parent / name
    torch.save({"epoch": 1, "state_dict": {f"module.{n}": t for n, t in state.items()}}, path)
    return path


def tags(output: Path) -> dict[str, str]:
    with closing(sqlite3.connect(output / "mlflow.db")) as database:
        return dict(database.execute("SELECT key, value FROM tags"))


def test_a_trained_teacher_of_ones_own_teaches_and_is_found_again(
    raygkd: Callable[..., Ran], nets: Path, tmp_path: Path
) -> None:
    teacher, output = weights(nets, 10), tmp_path / "out"
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "imagenet.safetensors")
    pair = ("--teacher", f"{nets}:net", "--teacher-weights", teacher, "--method", "kd")
    pair += ("--student", "timm:test_resnet")
    pair += ("--student-weights", tmp_path / "imagenet.safetensors")
    ran = raygkd("train", *DIGITS, *pair, "--output", output, "--json")
    assert ran.code == 0, ran.err
    assert "the teacher is used as it is: its weights have as many classes as" in ran.err
    assert "training teacher" not in ran.err
    told = " ".join(ran.err.split())
    assert "student weights: imagenet.safetensors (sha256 " in told
    assert "fc starts at random for this number of classes" in told
    result = json.loads(ran.out)
    assert result["models"]["teacher"]["model"] == "nets.py:net"
    file = load_model_file(result["teacher"]["path"])
    assert file.mean == (0.5, 0.5, 0.5)
    saved = torch.load(teacher, weights_only=True)["state_dict"]
    assert all(torch.equal(file.state_dict[n[7:]], tensor) for n, tensor in saved.items())
    student = load_model_file(result["model"])
    assert student.weights["source"] == "imagenet.safetensors"
    assert tags(output)["raygkd.student_weights.new_layers"] == "fc"

    # the run has copies of what it needs
    nets.unlink()
    moved = Path(result["teacher"]["path"]).parent.rename(tmp_path / "moved")
    (next((output / "inputs").glob("*-nets.py"))).unlink()
    ran = raygkd("evaluate", moved, "--dataset", "digits", "--output", output, "--json")
    assert ran.code == 0, ran.err
    [one] = json.loads(ran.out)["models"].values()
    assert one["model"] == "nets.py:net"
    assert one["scores"]["score"] == pytest.approx(result["models"]["teacher"]["test_score"])
    out = tmp_path / "student.safetensors"
    ran = raygkd("export", result["model"], "--format", "safetensors", "--out", out)
    assert ran.code == 0, ran.err
    assert "Training started from imagenet.safetensors" in out.with_suffix(".md").read_text()


def test_a_name_is_evaluated_with_its_weights(
    raygkd: Callable[..., Ran], refused: Callable[..., str], nets: Path, tmp_path: Path
) -> None:
    name, own = f"{nets}:net", weights(nets, 10)
    options = ("--dataset", "digits", "--json", "--output", tmp_path / "out")
    ran = raygkd("evaluate", name, "--weights", own, *options)
    assert ran.code == 0, ran.err
    assert name in json.loads(ran.out)["models"]


def test_a_teacher_of_other_classes_is_probed_and_sees_larger_images(
    raygkd: Callable[..., Ran], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    weights = tmp_path / "vit.safetensors"
    save_file(timm.create_model("test_vit", num_classes=7).state_dict(), weights)
    pair = (
        "--teacher",
        "timm:test_vit",
        "--teacher-weights",
        weights,
        "--teacher-image-size",
        "32",
    )
    ran = raygkd(
        "train", *DIGITS, *pair, "--levels", "2:1,3:4", "--output", tmp_path / "out", "--json"
    )
    assert ran.code == 0, ran.err
    told = " ".join(ran.err.split())
    assert "head starts at random for this number of classes" in told
    assert "the teacher's last layer is trained on features of its frozen backbone" in told
    assert "training teacher" not in told
    assert "2:1 32x4x4 64x2x2" in told
    scores = json.loads(ran.out)["models"]
    # features of random weights tell digits apart better than by chance, which is 0.1
    assert scores["teacher"]["test_score"] > 0.3


def test_the_classes_of_a_teacher_are_selected_by_name(
    raygkd: Callable[..., Ran], nets: Path, tmp_path: Path
) -> None:
    own, names = weights(nets, 12), tmp_path / "names.txt"
    order = ["ten", *map(str, reversed(range(10))), "eleven"]
    names.write_text("\n".join(order))
    pair = ("--teacher", f"{nets}:net", "--teacher-weights", own, "--teacher-classes", names)
    ran = raygkd("train", *DIGITS, *pair, *KD, "--output", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    told = "the teacher is used as it is: the images' 10 classes are selected from its 12 by name"
    assert told in ran.err
    file = load_model_file(json.loads(ran.out)["teacher"]["path"])
    assert file.class_names == tuple(map(str, range(10)))
    last = torch.load(own, weights_only=True)["state_dict"]["module.2.2.weight"]
    assert torch.equal(file.state_dict["2.2.weight"], last[1:11].flip(0))


def test_the_feature_maps_of_a_backbone_without_a_last_layer_teach(
    raygkd: Callable[..., Ran], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    backbone = tmp_path / "dino.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), backbone)
    pair = ("--teacher", "timm:test_vit", "--teacher-weights", backbone)
    pair += ("--teacher-mode", "features", "--teacher-image-size", "32")
    ran = raygkd("train", *DIGITS, *pair, "--output", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert "only the teacher's feature maps are used, not its logits" in ran.err
    [row] = [line for line in ran.out.splitlines() if "teacher" in line]
    assert row.split()[-1] == "-"
    ran = raygkd("report", tmp_path / "out")
    assert ran.code == 0, ran.err


KD = ("--method", "kd")
MISTAKES = [
    (("--student", "NETS:broken"), "nets.py, line 17: NameError: name 'undefined' is not"),
    (("--student", "NETS:pair"), "nets.py:pair: the model returns tuple: it must return logits"),
    (("--student", "NETS:nett"), "--student: nets.py:nett: there is no function 'nett'; did"),
    (("--student", "gone.py:net"), "--student: gone.py:net: cannot read gone.py: No such file"),
    (("--student", "timm:resnet18.a9"), "--student: unknown timm classifier 'resnet18.a9'; did"),
    (("--student", "hf:vit"), "--student: unknown hf classifier 'vit': is neither a folder nor"),
    (("--student", "NETS:net", "--student-weights", "pretrained"), "there are no weights of nets"),
    (("--student", "NETS:net", "--student-weights", "gone.pth"), "--student-weights: cannot read"),
    (("--student", "NETS:net", "--student-weights", "ARGS"), "--student-weights: "),
    (("--student", "resnet8", "--student-weights", "OWN"), "does not fit StagedClassifier, which"),
    (
        ("--teacher", "NETS:net", "--teacher-weights", "OWN", "--teacher-mode", "as-is", *KD),
        "error: --teacher-mode as-is: 2.2 of nets.py:net starts at random for the 3 classes",
    ),
    (
        ("--teacher", "NETS:net", "--teacher-mode", "probe", *KD),
        "error: --teacher-mode probe: the weights of nets.py:net are random; pass --teacher-weigh",
    ),
    (
        ("--teacher", "NETS:net", "--teacher-weights", "OWN", "--teacher-classes", "NETS", *KD),
        "classes, but none named 'class-0', a class of the images",
    ),
    (
        ("--teacher", "NETS:net", "--teacher-weights", "OWN", "--teacher-mode", "features", *KD),
        "--method kd: reads the teacher's logits, which --teacher-mode features does not use",
    ),
    (
        *(("--teacher", "timm:efficientformer_l1", "--teacher-weights", "none", *KD),),
        "12 x 12 pixels: efficientformer.py, line ",
    ),
    (("--teacher", "timm:test_vit", "--teacher-weights", "none", *KD), "--teacher-image-size)"),
    (("--teacher-image-size", "5000", *KD), "5000: must be at least 4 and at most 4096"),
    (("--teacher-classes", "NETS", *KD), "nets.py: the weights of resnet20 are random; omit it"),
    (
        ("--student", "open_clip:RN50"),
        "open_clip:RN50: classifies images by texts and cannot",
    ),
    (("--prompts", "NETS", *KD), "nets.py: resnet20 is not an image-text model, or is to be"),
    (("--student", "nets.py"), "--student: nets.py is a Python file; add the function"),
    (("--teacher", "nets.py", *KD), "--teacher: nets.py is a Python file; add the func"),
    (
        ("--student", "mobile"),
        "hf:NAME, timm:NAME, torchvision:NAME, FILE.py:FUNCTION)",
    ),
    (("--teacher", "OWN", *KD), "weights.pth contains weights, but not the name of their"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_what_is_wrong_is_one_line(
    refused: Callable[..., str],
    good: tuple[str, ...],
    nets: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    message: str,
) -> None:
    own = weights(nets, 7)
    arguments = tmp_path / "script.pth"
    torch.save({"state_dict": {}, "args": argparse.Namespace(lr=1)}, arguments)
    names = {"NETS": str(nets), "OWN": str(own), "ARGS": str(arguments)}
    for word, path in names.items():
        options = tuple(option.replace(word, path) for option in options)
    method = () if "--method" in options else ("--method", "none")
    assert message in refused("train", *options, *method, *good)
