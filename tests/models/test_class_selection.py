"""Class names of weights, and classifiers of some of their classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from raygkd.assembly.models import untrained_file
from raygkd.data.spec import ImageSpec
from raygkd.errors import ConfigError, DataError
from raygkd.models import (
    build_from_file,
    class_places,
    known_class_names,
    read_class_names,
    save_model_file,
    with_classes,
)

HEADS = """
from torch import nn


def convolution(classes):
    return nn.Sequential(nn.Conv2d(3, classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def wide(classes):
    # the hidden layer has as many rows as there are classes
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 4), nn.Linear(4, classes))


class Scaled(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.head = nn.Linear(3, classes)

    def forward(self, images):
        return self.head(images.mean((2, 3))).softmax(1)


def normalised(classes):
    return Scaled(classes)
"""
ANIMALS = ("cat", "dog", "eel", "fox")


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    path = tmp_path / "heads.py"
    path.write_text(HEADS)
    return path


@pytest.mark.parametrize(
    "name",
    [
        *("resnet8", "timm:test_resnet", "timm:test_vit", "timm:deit_tiny_distilled_patch16_224"),
        *("torchvision:squeezenet1_1", "torchvision:mobilenet_v3_small"),
        *("HEADS:convolution", "HEADS:wide"),
    ],
)
@pytest.mark.parametrize("wanted", [("fox", "cat", "eel", "dog"), ("eel", "cat")])
def test_the_logits_are_those_of_the_wanted_classes(
    heads: Path, name: str, wanted: tuple[str, ...]
) -> None:
    size = (32, 32)
    spec = ImageSpec(class_names=ANIMALS, image_size=size, mean=(0.5,) * 3, std=(0.2,) * 3)
    file = untrained_file(name.replace("HEADS", str(heads)), spec)
    places = class_places(ANIMALS, wanted, "they")
    selected = with_classes(file, places, wanted)
    assert selected.class_names == wanted
    images = torch.randn(3, 3, *size)
    whole = build_from_file(file)(images)
    assert torch.allclose(build_from_file(selected)(images), whole[:, list(places)], atol=1e-5)


def test_logits_that_depend_on_one_another_are_not_selected(heads: Path) -> None:
    spec = ImageSpec(class_names=ANIMALS, image_size=(8, 8), mean=(0.5,) * 3, std=(0.2,) * 3)
    file = untrained_file(f"{heads}:normalised", spec)
    with pytest.raises(ConfigError, match=r"heads\.py:normalised cannot be selected: its logits"):
        with_classes(file, (2, 0), ("eel", "cat"))


def test_names_are_found_as_people_write_them() -> None:
    names = ("n01440764, tench, Tinca tinca", "crane", "golden retriever", "crane, machine")
    assert class_places(names, ("Golden_Retriever", "tench", "machine"), "they") == (2, 0, 3)
    assert class_places(names, ("n01440764", "crane"), "they") == (0, 1)
    with pytest.raises(ConfigError, match="they has 4 classes, but 2 classes named 'Crane'"):
        class_places(names, ("Crane",), "they")
    with pytest.raises(ConfigError, match=r"none named 'tensh'.*; did you mean 'tench'"):
        class_places(names, ("tensh",), "they")
    with pytest.raises(ConfigError, match="'n01440764, tench, Tinca tinca' matches several"):
        class_places(names, ("tench", "Tinca tinca"), "they")


@pytest.mark.parametrize("text", ["cat\n\n dog\n", '["cat", "dog"]'])
def test_names_are_read_from_lines_and_lists(tmp_path: Path, text: str) -> None:
    path = tmp_path / "names.txt"
    path.write_text(text)
    assert read_class_names(str(path)) == ("cat", "dog")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must contain one class name per line, or a JSON list"),
        (b"[1, 2]", "must contain one class name per line, or a JSON list"),
        (b'["cat"', "is not a JSON list"),
        (b"cat\ncat\n", "'cat' is given more than once"),
        (b"\xff\xfe", "not UTF-8 text"),
        (None, "No such file"),
    ],
)
def test_what_holds_no_names_is_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "names.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_class_names(str(path))


def test_weights_come_with_names(tmp_path: Path) -> None:
    [tench, *_] = known_class_names("timm:resnet18.a1_in1k", "pretrained")
    assert tench == "n01440764, tench, Tinca tinca"
    assert known_class_names("torchvision:resnet18", "pretrained")[1] == "goldfish"
    assert known_class_names("timm:resnet18", "none") == ()
    spec = ImageSpec(class_names=ANIMALS, image_size=(8, 8), mean=(0.5,) * 3, std=(0.2,) * 3)
    save_model_file(tmp_path / "model.pt", untrained_file("resnet8", spec))
    assert known_class_names("resnet8", str(tmp_path / "model.pt")) == ANIMALS
    state = {"head.weight": torch.zeros(2, 3)}
    for held, names in (({}, ()), ({"classes": ["a", "b"]}, ("a", "b")), ({"classes": [0, 1]}, ())):
        torch.save({"state_dict": state, **held}, tmp_path / "weights.pth")
        assert known_class_names("resnet8", str(tmp_path / "weights.pth")) == names


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ({0: "cat", 1: "dog", 2: "eel"}, ("cat", "dog", "eel")),
        ({0: "LABEL_0", 1: "LABEL_1"}, ()),
        ({0: "cat", 2: "dog"}, ()),
    ],
)
def test_labels_of_transformers_are_names(
    tmp_path: Path, labels: dict[int, str], names: tuple[str, ...]
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(id2label=labels, label2id={v: k for k, v in labels.items()})
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "model.safetensors").touch()
    assert known_class_names(f"hf:{tmp_path}", None) == names
