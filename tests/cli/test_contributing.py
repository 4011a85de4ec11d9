"""The examples of CONTRIBUTING.md, each run as it stands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from raygkd.config import settings, with_settings
from raygkd.config.search_space import default_space
from raygkd.config.tree import Config
from raygkd.losses import BaselineLoss, baseline_loss
from raygkd.registry import METHODS

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
EXAMPLES = re.findall(r"^## (?:A|An) (.*?)\n.*?```python\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE)
REGISTRIES = (METHODS,)
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


def test_the_searched_setting() -> None:
    searched = run("searched setting")["Settings"]
    loss = run("loss")["Pooled"] if "pooled" not in METHODS.names() else METHODS.get("pooled")
    loss.Settings = searched
    space = {one.name: (one.kind, one.values) for one in default_space("pooled", {})}
    assert space["pooled.power"] == ("uniform", (1.0, 3.0))
    assert space["pooled.share"] == ("loguniform", (0.01, 1.0))
