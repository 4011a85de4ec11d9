"""Models, data sets and methods of other packages, by entry points."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from outcomes import CLASSES, Ran

from raygkd.errors import ConfigError
from raygkd.models import build_classifier, load_model_file
from raygkd.models.classifiers import CLASSIFIERS
from raygkd.registry import METHODS

REGISTRIES = (METHODS,)
NAMES = tuple(f"class-{number}" for number in range(CLASSES))
MODULE = """
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import nn

from raygkd.data.sources import Sample, Source
from raygkd.losses.base import FeatureLoss
from raygkd.registry import METHODS, option


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


@METHODS.register("telegraph")
class Telegraph(FeatureLoss):
    weight = 2.0
    levels = "last"

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        power: float = option(
            2.0, "power of the differences", above=0, search={"uniform": (1.0, 3.0)}
        )

    def __init__(self, setup, *, power):
        super().__init__(setup)
        self.power = power

    def level_loss(self, level, student_BCHW, teacher_BCHW):
        return (student_BCHW.mean(1) - teacher_BCHW.mean(1)).abs().pow(self.power).mean()


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
telegraph = own_things:Telegraph
"""


def params(output: Path) -> set[tuple[str, str]]:
    """Return name and value of the parameters that an MLflow store holds."""
    with closing(sqlite3.connect(output / "mlflow.db")) as database:
        return set(database.execute("SELECT key, value FROM params"))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
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
    yield
    sys.modules.pop("own_things", None)
    for registry in REGISTRIES:
        for name, entry in list(registry._entries.items()):
            if entry.__module__ == "own_things":
                del registry._entries[name]


@pytest.mark.usefixtures("package")
def test_a_model_learns_from_a_method_on_a_data_set_of_another_package(
    raygkd: Callable[..., Ran], model_file: Callable[..., Path], tmp_path: Path
) -> None:
    options = ("--dataset", "noise", "--student", "net", "--method", "telegraph", "--epochs", "1")
    options += ("--batch-size", "8", "--output", tmp_path / "out", "--json")
    options += ("--set", "telegraph.power=1.5")
    ran = raygkd("train", "--teacher", model_file(*NAMES), *options)
    assert ran.code == 0, ran.err
    assert "telegraph compares the maps of level 2" in ran.err
    result = json.loads(ran.out)
    assert result["models"]["student"]["model"] == "net"
    assert load_model_file(Path(result["model"])).class_names == NAMES
    journal = (Path(result["run"]) / "metrics.jsonl").read_text()
    assert json.loads(journal.splitlines()[0])["loss_telegraph"] > 0
    assert "telegraph:\n    power: 1.5\n" in (Path(result["run"]) / "config.yaml").read_text()
    assert ("telegraph.power", "1.5") in params(tmp_path / "out")


@pytest.mark.usefixtures("package")
def test_a_search_draws_the_settings_of_a_method_of_another_package(
    raygkd: Callable[..., Ran], model_file: Callable[..., Path], tmp_path: Path
) -> None:
    options = ("--dataset", "noise", "--student", "net", "--method", "telegraph", "--epochs", "1")
    options += ("--batch-size", "8", "--output", tmp_path / "out", "--trials", "2", "--json")
    ran = raygkd("tune", "--teacher", model_file(*NAMES), *options)
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    drawn = [trial["params"] for trial in result["trials"]]
    assert all(one.keys() == {"lr", "baseline_weight", "telegraph.power"} for one in drawn)
    assert all(1.0 <= one["telegraph.power"] <= 3.0 for one in drawn)
    logged = {value for name, value in params(tmp_path / "out") if name == "telegraph.power"}
    assert logged == {str(one["telegraph.power"]) for one in drawn}
    ran = raygkd("report", result["run"], "--json")
    assert ran.code == 0, ran.err
    page = Path(json.loads(ran.out)["html"]).read_text()
    assert "telegraph.power" in page


@pytest.mark.usefixtures("package")
def test_help_has_the_settings_of_another_package(raygkd: Callable[..., Ran]) -> None:
    text = " ".join(raygkd("train", "--help").out.split())
    assert "telegraph.power=FLOAT power of the differences [default: 2.0]" in text


@pytest.mark.usefixtures("package")
def test_wrong_settings_of_a_method_are_refused(
    refused: Callable[..., str], yaml_file: Callable[[str], Path], good: tuple[str, ...]
) -> None:
    train = ("train", "--method", "telegraph")
    error = refused(*train, "--set", "telegraph.power=0")
    assert "--set telegraph.power 0.0: must be above 0" in error
    error = refused(*train, "--set", "telegraph.power=much")
    assert "--set telegraph.power 'much': must be a number" in error
    for wrong in ("telegraph.powr=1", "telegraph.power", "lr=1"):
        assert f"--set {wrong!r}: must be NAME=VALUE" in refused(*train, "--set", wrong)
    error = refused("train", "--alpha", "3", "--set", "graph.alpha=3")
    assert "--set graph.alpha and --alpha are one setting: leave one of them out" in error
    path = yaml_file("method: {alpha: 3, graph: {alpha: 4}}")
    assert "graph.alpha and alpha are one setting" in refused("train", "--config", path)
    path = yaml_file("dkd.beta: {choice: [1, 2]}")
    error = refused("tune", *good, "--method", "telegraph", "--space", path)
    assert "dkd.beta is a setting of the method dkd, and --method is telegraph" in error


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
    error = refused("train", "--method", "means")
    assert "'means' is not one of 'none', 'graph'" in error


def test_without_the_package_there_are_the_own_names_alone() -> None:
    assert "net" not in CLASSIFIERS.names()
    with pytest.raises(ConfigError, match="unknown classifier 'net'"):
        build_classifier("net", 2)
