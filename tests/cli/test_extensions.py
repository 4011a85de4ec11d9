"""Models, data sets and methods of other packages, by entry points."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from outcomes import CLASSES, Ran

from raygkd.errors import ConfigError
from raygkd.models import build_classifier, load_model_file
from raygkd.models.classifiers import CLASSIFIERS

NAMES = tuple(f"class-{number}" for number in range(CLASSES))
MODULE = """
import io

import numpy as np
from PIL import Image
from torch import nn

from raygkd.data.sources import Sample, Source
from raygkd.losses import Baseline
from raygkd.losses.base import FeatureLoss


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, num_classes))

    def forward(self, images):
        return self.head(self.deep(self.wide(images)))


def encoded(number):
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def noise(options):
    samples = [
        Sample(n % 3, "train", f"noise {n}", lambda n=n: encoded(n)) for n in range(60)
    ]
    return Source("noise", ("class-0", "class-1", "class-2"), samples)


class Means(FeatureLoss):
    def level_loss(self, level, student_BCHW, teacher_BCHW):
        return (student_BCHW.mean(1) - teacher_BCHW.mean(1)).square().mean()


means = Baseline(
    build=Means, task="classification", reads="features", weight=2.0, source="here", levels="last"
)
number = 7
"""
POINTS = """
[raygkd.classifiers]
net = own_things:Net
broken = own_things_that_are_not:Net
number = own_things:number
wrn_40_1 = own_things:Net

[raygkd.datasets]
noise = own_things:noise

[raygkd.baselines]
means = own_things:means
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is installed here, and in the processes that come of this one.

    Scenes in the background start some of those, so it takes no name that they use.
    """
    folder = tmp_path / "site"
    info = folder / "own_things-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "own_things.py").write_text(MODULE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-things\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{os.environ.get('PYTHONPATH', '')}")


@pytest.mark.usefixtures("package")
def test_a_model_learns_from_a_method_on_a_data_set_of_another_package(
    raygkd: Callable[..., Ran], model_file: Callable[..., Path], tmp_path: Path
) -> None:
    options = ("--dataset", "noise", "--student", "net", "--method", "means", "--epochs", "1")
    options += ("--batch-size", "8", "--output", tmp_path / "out", "--json")
    ran = raygkd("train", "--teacher", model_file(*NAMES), *options)
    assert ran.code == 0, ran.err
    assert "means compares the maps of level 2" in ran.err
    result = json.loads(ran.out)
    assert result["models"]["student"]["model"] == "net"
    assert load_model_file(Path(result["model"])).class_names == NAMES
    journal = (Path(result["run"]) / "metrics.jsonl").read_text()
    assert json.loads(journal.splitlines()[0])["loss_means"] > 0


@pytest.mark.usefixtures("package")
def test_what_is_broken_names_its_package(refused: Callable[..., str]) -> None:
    error = refused("train", "--student", "broken", "--method", "none")
    assert (
        "--student: classifier 'broken' of the package own-things cannot be loaded "
        "(ModuleNotFoundError: No module named 'own_things_that_are_not'): repair or uninstall"
    ) in error
    error = refused("train", "--student", "number", "--method", "none")
    assert "of the package own-things is of the type int and not Callable" in error
    error = refused("train", "--student", "wrn_40_1", "--method", "none")
    assert "classifier 'wrn_40_1' is of several packages (own-things, raygkd)" in error
    error = refused("train", "--student", "nett", "--method", "none")
    assert "unknown classifier 'nett'; did you mean 'net'" in error
    error = refused("train", "--method", "mean")
    assert "'mean' is not one of 'none', 'kd'" in error


def test_without_the_package_there_are_the_own_names_alone() -> None:
    assert "net" not in CLASSIFIERS.names()
    with pytest.raises(ConfigError, match="unknown classifier 'net'"):
        build_classifier("net", 2)
