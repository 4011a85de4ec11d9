"""The examples of docs/guides/extending.md, each run as it stands."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from raygkd.config import settings, with_settings
from raygkd.config.search_space import default_space
from raygkd.config.tree import Config
from raygkd.data import decode, open_source
from raygkd.deploy.model import load_model
from raygkd.errors import ConfigError
from raygkd.losses import BaselineLoss, baseline_loss
from raygkd.metrics.metric import RegisteredMeter
from raygkd.metrics.ranking import rank
from raygkd.models import build_model, feature_shapes, load_model_file
from raygkd.registry import DATASETS, FAMILIES, FORMATS, METHODS, METRICS

TEXT = (Path(__file__).parents[2] / "docs" / "guides" / "extending.md").read_text()
EXAMPLES = re.findall(r"^## (?:A|An) (.*?)\n.*?```python\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE)
REGISTRIES = (METHODS, METRICS, FORMATS, DATASETS, FAMILIES)
MOST_LINES = 30


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Take out of the tables what an example puts in."""
    before = {registry: dict(registry._entries) for registry in REGISTRIES}
    yield
    for registry in REGISTRIES:
        for name, entry in list(registry._entries.items()):
            if name not in before[registry] and entry.__module__ == "example":
                del registry._entries[name]


def run(name: str) -> dict[str, Any]:
    """Execute an example; return its names."""
    scope: dict[str, Any] = {"__name__": "example"}
    exec(compile(dict(EXAMPLES)[name], name, "exec", dont_inherit=True), scope)
    return scope


def test_every_example_is_short() -> None:
    for name, text in EXAMPLES:
        code = [line for line in text.splitlines() if line]
        assert len(code) <= MOST_LINES, name


def test_the_loss() -> None:
    run("loss")
    assert issubclass(METHODS.get("pooled"), BaselineLoss)
    maps = {1: torch.ones(2, 3, 4, 4)}, {1: torch.zeros(2, 5, 2, 2)}
    loss = baseline_loss("pooled", power=1.5)
    assert loss(student_features=maps[0], teacher_features=maps[1]) == 1
    assert settings()["pooled.power"][0] == "method"
    assert with_settings(Config(), {"pooled.power": 1, "method": "pooled"}).method.own


def test_the_metric() -> None:
    run("metric")
    meter = RegisteredMeter("classification", 2)
    meter.update(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
    meter.update(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1]))
    meter.reduce(lambda sums: 2 * sums, torch.device("cpu"))
    scores = meter.added_to({"loss": 0.5})
    assert scores["loss"] == 0.5
    assert scores["calibration_gap"] == pytest.approx(1 / 6)
    assert rank(0.1, "calibration_gap") > rank(0.2, "calibration_gap")
    assert with_settings(Config(), {"score": "calibration_gap"}).data.score == "calibration_gap"
    with pytest.raises(
        ConfigError, match="metric 'calibration_gap': a score already has this name"
    ):
        meter.added_to({"calibration_gap": 0.5})


def test_the_data_set() -> None:
    run("data set")
    assert len(open_source("noise").samples) == 60
    source = open_source("noise", own={"images": 24})
    assert decode(source.samples[23].read()).shape == (3, 8, 8)
    config = with_settings(Config(), {"dataset": "noise", "noise.images": 24})
    assert config.data.own == {"noise.images": 24}


def test_the_model_family() -> None:
    run("model family")
    model = build_model("plain:narrow", 5, (16, 16))
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 5)
    assert feature_shapes(model, (1, 2), (16, 16)) == {1: (8, 8, 8), 2: (8, 4, 4)}


def test_the_export_format(model_file: Callable[..., Path], tmp_path: Path) -> None:
    run("export format")
    given, images_BCSS = load_model_file(model_file("a", "b")), torch.rand(2, 3, 12, 12)
    written = FORMATS.get("copy")().write(given, tmp_path / "model.copy")
    facts, read = load_model(tmp_path / "model.copy")
    assert facts.class_names == ("a", "b")
    assert torch.equal(written(images_BCSS), read(images_BCSS))
    assert FORMATS.summaries()["copy"] == "A copy of the model file"


def test_the_searched_setting() -> None:
    searched = run("searched setting")["Settings"]
    loss = run("loss")["Pooled"] if "pooled" not in METHODS.names() else METHODS.get("pooled")
    loss.Settings = searched
    space = {one.name: (one.kind, one.values) for one in default_space("pooled", {})}
    assert space["pooled.power"] == ("uniform", (1.0, 3.0))
    assert space["pooled.share"] == ("loguniform", (0.01, 1.0))
