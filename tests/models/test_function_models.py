"""Models that are named FILE.py:FUNCTION or package.module:function."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from raygkd.errors import ConfigError
from raygkd.models import (
    ModelFile,
    build_from_file,
    build_model,
    check_model_name,
    is_classifier,
    load_model_file,
    model_input,
    save_model_file,
    short_name,
    stage_modules,
)

SOURCE = """
from dataclasses import dataclass

import torch
from torch import nn

MEAN = STD = (0.5, 0.25, 0.125)
SIZE = 24
asked = []


@dataclass
class Output:
    logits: torch.Tensor


class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.deep = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, classes))

    def forward(self, images):
        return self.head(self.deep(self.wide(images)))


class Wrapped(Net):
    def forward(self, images):
        return Output(super().forward(images))


class Pair(Net):
    def forward(self, images):
        return super().forward(images), images


def net(classes):
    asked.append(classes)
    return Net(classes)


def wrapped(classes):
    return Wrapped(classes)


def pair(classes):
    return Pair(classes)


def fixed(classes):
    return Net(3)


def strict(classes):
    assert classes == 5, "five classes only"
    return Net(classes)


def nothing(classes):
    return None


SHARED = Net(4)


def shared(classes):
    return SHARED


def double(classes):
    return Net(classes).double()


def lazy(classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))


def script(classes):
    return torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(9, classes)))
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "nets.py"
    path.write_text(SOURCE)
    return path


def images() -> torch.Tensor:
    return torch.rand(2, 3, 24, 24)


def model_file(name: str, model: nn.Module) -> ModelFile:
    return ModelFile(
        name=name,
        class_names=("a", "b", "c", "d", "e"),
        image_size=(24, 24),
        mean=(0.5, 0.5, 0.5),
        std=(1.0, 1.0, 1.0),
        state_dict=model.state_dict(),
        scores={},
        config="",
    )


def test_a_function_is_called_with_the_number_of_classes_alone(source: Path) -> None:
    name = f"{source}:net"
    check_model_name(name)
    assert is_classifier(name)
    model = build_model(name, 5, (24, 24))
    assert model(images()).shape == (2, 5)
    assert stage_modules(model) == {1: "wide", 2: "deep"}
    asked = [vars(model_class)["__init__"].__globals__["asked"] for model_class in [type(model)]]
    assert asked == [[5]]
    wanted = model_input(name)
    assert (wanted.size, wanted.mean, wanted.std) == ((24, 24), (0.5, 0.25, 0.125), wanted.mean)


def test_output_with_logits_is_unwrapped(source: Path) -> None:
    assert build_model(f"{source}:wrapped", 5, (24, 24))(images()).shape == (2, 5)


def test_a_function_of_an_installed_package_is_a_model(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = source.parent / "own_package_of_nets"
    package.mkdir()
    (package / "__init__.py").touch()
    source.rename(package / "nets.py")
    monkeypatch.syspath_prepend(str(source.parent))
    name = "own_package_of_nets.nets:wrapped"
    check_model_name(name)
    assert build_model(name, 5, (24, 24))(images()).shape == (2, 5)
    assert model_input(name).std == (0.5, 0.25, 0.125)
    with pytest.raises(ConfigError, match=r"No module named 'own_package_of_nets\.others'"):
        check_model_name("own_package_of_nets.others:net")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nett", "nets.py:nett: there is no function 'nett'; did you mean 'net'"),
        ("nothing", "nets.py:nothing returned NoneType, not a torch.nn.Module"),
        ("strict", "nets.py:strict: nets.py, line 56: AssertionError: five classes only"),
        ("pair", "nets.py:pair: the model returns tuple: it must return logits, a tensor (B, 4)"),
        ("double", "nets.py:double: wide.0.weight is float64 on cpu; return a float32 model"),
        ("lazy", "nets.py:lazy: 1.weight has no shape yet; do not use lazy layers"),
        ("script", "nets.py:script returned a TorchScript program"),
        ("fixed", "nets.py:fixed: the model returns a tensor (2, 3): it must be (B, 4)"),
    ],
)
def test_what_is_wrong_with_a_function_is_one_line(source: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_model(f"{source}:{name}", 4, (24, 24))(images())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0", "bad.py:net: bad.py, line 1: ZeroDivisionError"),
        ("x = 1\ndef net(:", "bad.py:net: bad.py, line 2: SyntaxError"),
        ("import nothing_such", "No module named 'nothing_such': only this file is copied"),
        ("MEAN = (1, 2)\nSTD = (1, 1, 1)\nnet = 1", "there is no function 'net'"),
        (
            "import sys\nsys.exit(4)",
            "bad.py:net: bad.py, line 2: SystemExit: 4; put what the script",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(ConfigError) as caught:
        check_model_name(f"{tmp_path}/bad.py:net")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MEAN = (1, 2)\nSTD = (1, 1, 1)", r"MEAN \(1, 2\): must be three numbers"),
        ("MEAN = (1, 2, 3)", "MEAN and STD: define both, or neither"),
        ("SIZE = 'large'", "SIZE 'large': must be a number of pixels"),
        ("SIZE = True", "SIZE True: must be a number of pixels"),
        ("MEAN = (0, 0, 0)\nSTD = (1, 0, 1)", r"STD \(1, 0, 1\): must be finite numbers above 0"),
        ("STD = (1, 1, 1)\nMEAN = (0, 0, float('nan'))", r"MEAN .*: must be finite numbers"),
    ],
)
def test_wrong_constants_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(ConfigError, match=message):
        model_input(f"{tmp_path}/bad.py:net")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*none\.py: No such file or directory"):
        check_model_name(f"{tmp_path}/none.py:net")


def test_names_without_a_family_are_explained() -> None:
    for name, message in [
        ("timn:resnet18", "did you mean 'timm:resnet18'?"),
        ("no_such_package.nets:net", "the prefix must be one of"),
        ("resnet50", "did you mean 'timm:resnet50' or 'torchvision:resnet50'?"),
    ]:
        with pytest.raises(ConfigError) as caught:
            check_model_name(name)
        assert message in str(caught.value)


def test_a_model_file_keeps_its_source_beside_it(source: Path, tmp_path: Path) -> None:
    name = f"{source}:net"
    model = build_model(name, 5, (24, 24)).eval()
    folder = tmp_path / "run"
    folder.mkdir()
    save_model_file(folder / "model.pt", model_file(name, model))
    assert (folder / "nets.py").read_text() == SOURCE
    assert load_model_file(folder / "model.pt").name == name
    source.unlink()
    moved = folder.rename(tmp_path / "moved")
    found = load_model_file(moved / "model.pt")
    assert found.name == f"{moved}/nets.py:net"
    given = images()
    assert torch.equal(build_from_file(found)(given), model(given))
    (moved / "nets.py").unlink()
    with pytest.raises(
        ConfigError, match=r"cannot read .*nets\.py: .*restore it or put it next to"
    ):
        build_from_file(load_model_file(moved / "model.pt"))


def test_reading_a_model_file_runs_nothing(source: Path, tmp_path: Path) -> None:
    model = build_model(f"{source}:net", 5, (24, 24))
    save_model_file(tmp_path / "model.pt", model_file(f"{source}:net", model))
    source.write_text("raise SystemExit('ran')")
    assert load_model_file(tmp_path / "model.pt").class_names == ("a", "b", "c", "d", "e")


def test_short_names_have_no_folders() -> None:
    assert short_name("/out/inputs/0123456789abcdef-nets.py:net") == "nets.py:net"
    assert short_name("hf:/models/vit") == "hf:vit"
    for name in ("resnet8", "timm:hf-hub:org/name", "hf:org/name", "package.nets:net"):
        assert short_name(name) == name


def test_a_model_that_is_returned_twice_is_refused(source: Path) -> None:
    build_model(f"{source}:shared", 4, (24, 24))
    with pytest.raises(ConfigError, match="returned the same model twice: student and teacher"):
        build_model(f"{source}:shared", 4, (24, 24))


def test_a_file_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.py")
    with pytest.raises(ConfigError, match=r"cannot read .*pipe\.py: not a regular file"):
        check_model_name(f"{tmp_path}/pipe.py:net")


def test_the_family_of_functions_has_no_prefix() -> None:
    with pytest.raises(ConfigError, match="the prefix must be one of"):
        check_model_name("function:net")


def test_a_folder_of_nobody_is_refused() -> None:
    with pytest.raises(ConfigError, match="is not a usable path: there is no such user"):
        check_model_name("hf:~no-such-user/model")
