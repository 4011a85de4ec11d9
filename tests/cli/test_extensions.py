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
import torch
from outcomes import CLASSES, Ran, png

from raygkd.config import from_mapping
from raygkd.errors import ConfigError
from raygkd.models import (
    build_classifier,
    build_model,
    is_classifier,
    is_detector,
    load_model_file,
    stage_modules,
)
from raygkd.models.classifiers import CLASSIFIERS
from raygkd.registry import DATASETS, FAMILIES, FORMATS, METHODS, METRICS

REGISTRIES = (METHODS, METRICS, FORMATS, DATASETS, FAMILIES)
NAMES = tuple(f"class-{number}" for number in range(CLASSES))
MODULE = """
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image
import torch
from torch import nn

from raygkd.data.sources import DataSet, Sample, Source
from raygkd.deploy.exporters.formats import ExportFormat
from raygkd.deploy.facts import facts_of
from raygkd.deploy.modules import on_device, student
from raygkd.losses.base import FeatureLoss
from raygkd.metrics.metric import Metric
from raygkd.models import ModelFamily, ModelInput, load_model_file, save_model_file
from raygkd.registry import DATASETS, FAMILIES, FORMATS, METHODS, METRICS, option


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


@FAMILIES.register("ssdgraph")
class Nets(ModelFamily):
    loads_weights = True

    def names(self):
        return ("tiny_fpn",)

    def build(self, name, num_classes, image_size):
        return Net(num_classes)

    def inputs(self, name):
        return ModelInput(mean=(0.25, 0.5, 0.75), std=(0.25, 0.5, 0.75))

    def levels(self, model):
        return {1: "wide", 2: "deep"}

    def load_weights(self, model, name, weights):
        with torch.no_grad():
            model.head[2].bias.fill_(float(weights))


@DATASETS.register("fpn-noise")
class Noise(DataSet):
    task = "classification"
    augment = "none"
    can_fetch = True
    recipe = {"epochs": 1, "batch_size": 8, "student": "net"}

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        images: int = option(60, "number of images", minimum=30)

    def open(self, options):
        samples = [
            Sample(n % 3, "train", f"noise {n}", lambda n=n: encoded(n))
            for n in range(options.own["images"])
        ]
        return Source("fpn-noise", ("class-0", "class-1", "class-2"), samples)


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


@METRICS.register("fpn-doubt")
class Doubt(Metric):
    title = "mean doubt"
    higher_is_better = False

    def sums(self, logits_BK, labels_B):
        doubt_B = 1 - logits_BK.softmax(1).amax(1)
        return torch.stack([doubt_B.sum(), doubt_B.new_tensor(len(doubt_B))])


@FORMATS.register("ssdump")
class Dump(ExportFormat):
    "A dump of the weights."

    suffix = ".dump"

    def write(self, model_file, path):
        save_model_file(path, model_file)
        return self.read(path)[1]

    def read(self, path):
        model_file = load_model_file(path)
        module = student(model_file)
        return facts_of(model_file), on_device(module, torch.device("cpu"))


number = 7
"""
POINTS = """
[raygkd.classifiers]
net = own_things:Net
my_graph_ssd_fpn = own_things:Net
broken = own_things_that_are_not:Net
number = own_things:number
wrn_40_1 = own_things:Net

[raygkd.model_families]
ssdgraph = own_things:Nets

[raygkd.datasets]
fpn-noise = own_things:Noise

[raygkd.baselines]
telegraph = own_things:Telegraph

[raygkd.metrics]
fpn-doubt = own_things:Doubt

[raygkd.formats]
ssdump = own_things:Dump
"""


def params(output: Path) -> set[tuple[str, str]]:
    """Return name and value of the parameters that an MLflow store holds."""
    with closing(sqlite3.connect(output / "mlflow.db")) as database:
        return set(database.execute("SELECT key, value FROM params"))


def metrics(output: Path) -> set[str]:
    """Return the names of the metrics that an MLflow store holds."""
    with closing(sqlite3.connect(output / "mlflow.db")) as database:
        return {name for (name,) in database.execute("SELECT key FROM metrics")}


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
        registry._loaded.clear()
        for name, entry in list(registry._entries.items()):
            if entry.__module__ == "own_things":
                del registry._entries[name]


@pytest.mark.usefixtures("package")
def test_a_model_learns_from_a_method_on_a_data_set_of_another_package(
    raygkd: Callable[..., Ran], model_file: Callable[..., Path], tmp_path: Path
) -> None:
    options = ("--dataset", "fpn-noise", "--method", "telegraph", "--output", tmp_path / "out")
    options += ("--set", "telegraph.power=1.5", "--set", "fpn-noise.images=72", "--json")
    ran = raygkd("train", "--teacher", model_file(*NAMES), *options)
    assert ran.code == 0, ran.err
    assert "telegraph compares the maps of levels 2:2 (student:teacher)" in ran.err
    result = json.loads(ran.out)
    assert result["models"]["student"]["model"] == "net"
    assert load_model_file(Path(result["model"])).class_names == NAMES
    journal = (Path(result["run"]) / "metrics.jsonl").read_text()
    assert json.loads(journal.splitlines()[0])["loss_telegraph"] > 0
    assert "telegraph:\n    power: 1.5\n" in (Path(result["run"]) / "config.yaml").read_text()
    assert ("telegraph.power", "1.5") in params(tmp_path / "out")
    assert ("fpn-noise.images", "72") in params(tmp_path / "out")
    written = (Path(result["run"]) / "config.yaml").read_text()
    assert "fpn-noise:\n    images: 72\n" in written
    assert "augment: none" in load_model_file(Path(result["model"])).config
    assert 0 < json.loads(journal.splitlines()[0])["val_fpn-doubt"] < 1
    assert "val_fpn-doubt" in metrics(tmp_path / "out")
    model, out = result["model"], tmp_path / "out"
    dump = tmp_path / "model.dump"
    ran = raygkd("export", model, "--format", "ssdump", "--out", dump, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["check"]["largest"] == 0
    data = ("--dataset", "fpn-noise", "--output", out, "--split", "test")
    ran = raygkd("evaluate", model, dump, *data)
    assert ran.code == 0, ran.err
    assert "mean doubt (lower is better)" in ran.out
    assert "test_fpn-doubt" in metrics(tmp_path / "out")
    (tmp_path / "one.png").write_bytes(png(1))
    ran = raygkd("predict", dump, tmp_path / "one.png")
    assert (ran.code, len(ran.out.splitlines())) == (0, 1), ran.err


@pytest.mark.usefixtures("package")
def test_a_search_draws_the_settings_of_a_method_of_another_package(
    raygkd: Callable[..., Ran], model_file: Callable[..., Path], tmp_path: Path
) -> None:
    options = ("--dataset", "fpn-noise", "--method", "telegraph", "--output", tmp_path / "out")
    # lower doubt is better
    options += ("--trials", "2", "--scheduler", "none", "--score", "fpn-doubt", "--json")
    ran = raygkd("tune", "--teacher", model_file(*NAMES), *options)
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    doubts = [trial["val_score"] for trial in result["trials"]]
    assert 0 < doubts[0] < doubts[1] < 1
    assert result["best"]["val_score"] == doubts[0]
    journal = (Path(result["run"]) / "trials.jsonl").read_text().splitlines()
    told = [one["metrics"] for one in map(json.loads, journal) if "metrics" in one]
    assert all(one["val_score"] == one["val_fpn-doubt"] for one in told)
    verdict, best, alone = (result[name] for name in ("verdict", "best", "student_alone"))
    assert verdict["score"] == "fpn-doubt"
    assert verdict["standard_error"] > 0
    assert "mean doubt" in verdict["line"]
    is_better = best["test_score"] < alone["test_score"]
    assert verdict["outcome"] in ("no different", "better" if is_better else "worse")
    drawn = [trial["params"] for trial in result["trials"]]
    assert all(one.keys() == {"lr", "baseline_weight", "telegraph.power"} for one in drawn)
    assert all(1.0 <= one["telegraph.power"] <= 3.0 for one in drawn)
    assert {"lr": 0.05, "baseline_weight": None, "telegraph.power": 2.0} in drawn
    logged = {value for name, value in params(tmp_path / "out") if name == "telegraph.power"}
    assert logged == {str(one["telegraph.power"]) for one in drawn}
    ran = raygkd("report", result["run"], "--json")
    assert ran.code == 0, ran.err
    page = Path(json.loads(ran.out)["html"]).read_text()
    assert "telegraph.power" in page
    assert "mean doubt (lower is better)" in page
    trials = (Path(result["run"]) / "trials.jsonl").read_text()
    assert trials.count('"val_fpn-doubt"') == 2


@pytest.mark.usefixtures("package")
def test_a_model_of_a_family_of_another_package_is_trained_from_its_weights(
    raygkd: Callable[..., Ran], model_file: Callable[..., Path], tmp_path: Path
) -> None:
    options = ("--dataset", "fpn-noise", "--method", "graph", "--dim", "2", "--lr", "1e-9")
    options += ("--student", "ssdgraph:tiny_fpn", "--student-weights", "7.5")
    options += ("--output", tmp_path / "out", "--json")
    ran = raygkd("train", "--teacher", model_file(*NAMES), *options)
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    file = load_model_file(Path(result["model"]))
    assert (file.name, file.mean) == ("ssdgraph:tiny_fpn", (0.25, 0.5, 0.75))
    assert file.state_dict["head.2.bias"].tolist() == pytest.approx([7.5] * 3, abs=1e-3)
    ran = raygkd("evaluate", result["model"], "--dataset", "fpn-noise", "--json")
    assert ran.code == 0, ran.err


@pytest.mark.usefixtures("package")
def test_names_with_the_marks_of_others_are_taken_for_what_they_are(
    refused: Callable[..., str],
) -> None:
    for name in ("my_graph_ssd_fpn", "ssdgraph:tiny_fpn"):
        assert is_classifier(name)
        assert not is_detector(name)
        assert isinstance(build_model(name, 3, (12, 12)), torch.nn.Module)
        config = from_mapping({"data": {"dataset": "parquet"}, "model": {"student": name}})
        assert config.optim.optimizer == "sgd"
    assert stage_modules(build_model("ssdgraph:tiny_fpn", 3, (12, 12))) == {1: "wide", 2: "deep"}
    error = refused("train", "--student", "ssdgraph:tiny", "--method", "none")
    assert "unknown ssdgraph classifier 'tiny'; did you mean 'tiny_fpn'" in error


@pytest.mark.usefixtures("package")
def test_help_has_the_settings_of_another_package(raygkd: Callable[..., Ran]) -> None:
    text = " ".join(raygkd("train", "--help").out.split())
    assert "telegraph.power=FLOAT power of the differences [default: 2.0]" in text
    assert "fpn-noise.images=INTEGER number of images [default: 60]" in text
    assert "yolo, fpn-noise, parquet, or auto" in text
    # a line may be broken at the hyphen
    assert "or fpn-noise into --data-dir" in text.replace("- noise", "-noise")
    text = " ".join(raygkd("export", "--help").out.split())
    assert "torch|ssdump]" in text
    assert "ssdump: a dump of the weights" in text


@pytest.mark.usefixtures("package")
def test_wrong_settings_of_a_method_are_refused(
    refused: Callable[..., str], yaml_file: Callable[[str], Path], good: tuple[str, ...]
) -> None:
    train = ("train", "--method", "telegraph")
    error = refused(*train, "--set", "telegraph.power=0")
    assert "--set telegraph.power 0.0: must be above 0" in error
    error = refused(*train, "--set", "telegraph.power=much")
    assert "--set telegraph.power 'much': must be a number" in error
    error = refused(*train, "--set", "telegraph.power")
    assert "--set 'telegraph.power': has no value; write telegraph.power=VALUE" in error
    for wrong in ("telegraph.powr=1", "telegraph.powr", "lr=1"):
        assert f"--set {wrong!r}: must be NAME=VALUE" in refused(*train, "--set", wrong)
    for command in (("train",), ("data", "prepare", "--output", "shards")):
        error = refused(*command, "--dataset", "fpn-noise", "--set", "fpn-noise.images=3")
        assert "--set fpn-noise.images 3: must be at least 30" in error
    error = refused("train", "--alpha", "3", "--set", "graph.alpha=3")
    assert "--set graph.alpha and --alpha are the same setting; use only one of them" in error
    path = yaml_file("method: {alpha: 3, graph: {alpha: 4}}")
    assert "graph.alpha and alpha are the same setting" in refused("train", "--config", path)
    path = yaml_file("dkd.beta: {choice: [1, 2]}")
    error = refused("tune", *good, "--method", "telegraph", "--space", path)
    assert "search space: dkd.beta: has no effect on --method telegraph; omit it" in error


@pytest.mark.usefixtures("package")
def test_what_is_broken_names_its_package(refused: Callable[..., str]) -> None:
    error = refused("train", "--student", "broken", "--method", "none")
    assert (
        "--student: classifier 'broken' of the package own-things cannot be loaded "
        "(ModuleNotFoundError: No module named 'own_things_that_are_not'); repair or uninstall"
    ) in error
    error = refused("train", "--student", "number", "--method", "none")
    assert "of the package own-things has type int, not Callable" in error
    error = refused("train", "--student", "wrn_40_1", "--method", "none")
    assert "classifier 'wrn_40_1' is provided by several packages (own-things, raygkd)" in error
    error = refused("train", "--student", "nett", "--method", "none")
    assert "unknown classifier 'nett'; did you mean 'net'" in error
    error = refused("train", "--method", "means")
    assert "'means' is not one of 'none', 'graph'" in error


def test_without_the_package_there_are_the_own_names_alone() -> None:
    assert "net" not in CLASSIFIERS.names()
    with pytest.raises(ConfigError, match="unknown classifier 'net'"):
        build_classifier("net", 2)
