"""The commands as Python functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ray import tune
from torch import nn

import raygkd
from raygkd.commands import Run, _space_file
from raygkd.config.search_space import read_space
from raygkd.errors import ConfigError

DOMAINS = {
    "lr": tune.loguniform(0.01, 0.1),
    "temperature": tune.uniform(5, 50),
    "dim": tune.randint(2, 6),
    "levels": tune.choice([[1, 2], [1, 2, 3]]),
    "alpha": [1.0, 3.0],
    "beta": {"uniform": [0.0, 1.0]},
}
SMALL = {
    "dataset": "digits",
    "limit_train": 128,
    "teacher": "resnet8",
    "teacher_epochs": 1,
    "student": "resnet8",
    "epochs": 1,
}


def linear(classes: int) -> nn.Module:
    """Return a model that tests name by this function."""
    return nn.Sequential(nn.Flatten(), nn.Linear(192, classes))


@pytest.mark.unit
def test_a_space_may_be_written_in_three_ways(tmp_path: Path) -> None:
    path = _space_file(DOMAINS, str(tmp_path))
    found = {one.name: (one.kind, one.values) for one in read_space(str(path))}
    assert found == {
        "lr": ("loguniform", (0.01, 0.1)),
        "temperature": ("uniform", (5, 50)),
        "dim": ("randint", (2, 6)),
        "levels": ("choice", ([1, 2], [1, 2, 3])),
        "alpha": ("choice", (1.0, 3.0)),
        "beta": ("uniform", (0.0, 1.0)),
    }


@pytest.mark.unit
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trails": 3}, "raygkd.tune: no setting 'trails'; did you mean 'trials'?"),
        ({"space": {"lr": tune.quniform(0, 1, 0.1)}}, "space: lr: "),
        ({"space": {"lr": 0.1}}, "space: lr: 0.1 is not supported; use a list of choices"),
        ({"teacher": nn.Linear(2, 2)}, "teacher: is a Linear, which other processes cannot build"),
        (
            {"student": lambda classes: nn.Linear(2, classes)},
            "must be defined at the top level of a .py file",
        ),
        ({"trials": 0}, "--trials 0: must be at least 1"),
    ],
)
def test_mistakes_are_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        raygkd.tune(**settings)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.unit
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.yaml"):
        Run(str(tmp_path))


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Run:
    output = tmp_path_factory.mktemp("python")
    space = {"lr": tune.loguniform(0.01, 0.1), "alpha": [1.0, 3.0]}
    return raygkd.tune(**SMALL, trials=2, space=space, output=output, name="python")


@pytest.mark.ray
def test_a_search_returns_its_run(searched: Run) -> None:
    folder = Path(searched.folder)
    assert searched.result == json.loads((folder / "result.json").read_text())
    assert repr(searched) == f"<raygkd run {folder}, {searched.result['verdict']['line']}>"
    assert searched.run_id == searched.result["mlflow"]["parent_run_id"]
    trials = searched.trials
    assert list(trials["number"]) == [row["number"] for row in searched.result["trials"]]
    assert set(trials.columns) == {"number", "lr", "alpha", "epochs", "val_score", "status"}
    assert trials["val_score"].iloc[0] == searched.result["best"]["val_score"]
    best = searched.result["best"]["params"]
    assert searched.settings["optim"]["lr"] == best["lr"]
    space = yaml.safe_load((folder / "config.yaml").read_text())["search"]["space"]
    assert [one.name for one in read_space(space)] == ["lr", "alpha"]


@pytest.mark.ray
def test_a_run_gives_its_model_and_its_report(searched: Run) -> None:
    with torch.inference_mode():
        assert searched.model()(torch.rand(2, 3, 8, 8)).shape == (2, 10)
    assert "best student" in Path(searched.report()).read_text()


@pytest.mark.ray
def test_a_finished_run_is_opened_and_not_changed(searched: Run) -> None:
    before = (Path(searched.folder) / "result.json").stat().st_mtime_ns
    again = Run(searched.folder)
    assert again.result["verdict"] == searched.result["verdict"]
    assert (Path(searched.folder) / "result.json").stat().st_mtime_ns == before


@pytest.mark.ray
def test_a_student_may_be_a_function(tmp_path: Path) -> None:
    run = raygkd.train(
        **{**SMALL, "student": linear, "method": "kd"}, output=tmp_path, tracking_uri=None
    )
    assert run.result["models"]["student"]["parameters"] == 1930
    assert run.model()(torch.rand(1, 3, 8, 8)).shape == (1, 10)
