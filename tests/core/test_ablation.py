"""What a comparison trains."""

from __future__ import annotations

import pytest

from raygkd.assembly.methods import baseline_of, suits
from raygkd.config import Config, with_settings
from raygkd.errors import ConfigError
from raygkd.losses import baseline_class, baseline_names
from raygkd.registry import METHODS
from raygkd.workflows.ablation import is_baseline, variants

CHANNELS = {1: 16, 2: 32, 3: 64}
DETECTION = ["none", "graph", "mgd", "cwd", "pkd", "fgd"]


def names(task: str = "classification", **settings: object) -> list[str]:
    return list(variants(with_settings(Config(), settings), task, CHANNELS))


def test_methods_are_the_baselines_ours_and_none():
    ours = {"graph", "graph+kd", "graph+dist", "graph+metrics"}
    assert set(METHODS.names()) == {"none", *baseline_names(), *ours}


def test_without_a_choice_all_that_suit_the_images_are_compared():
    assert names("detection") == DETECTION
    assert names() == [name for name in METHODS.names() if name not in DETECTION[2:]]


def test_a_choice_is_compared_in_its_order():
    assert names(methods=["at", "none"]) == ["at", "none"]


@pytest.mark.parametrize("method", METHODS.names())
def test_a_method_suits_the_task_of_its_baseline(method: str):
    baseline = baseline_of(method)
    for task in ("classification", "detection"):
        assert suits(method, task) == (baseline is None or baseline_class(baseline).task == task)


def test_an_ablation_changes_one_thing_at_a_time():
    found = variants(with_settings(Config(), {"preset": "ablation"}), "classification", CHANNELS)
    # vertices alone are the row "graph", and what it leaves out has a weight of 1
    terms = ["E", "S", "V+E", "V+S", "E+S", "V+E+S"]
    assert list(found)[:10] == ["none", "graph", "graph+kd", "graph+dist", *terms]
    assert found["V+S"] == {"method": "graph", "alpha": 3.0, "beta": 0.0, "gamma": 1.0}
    assert found["S"] == {"method": "graph", "alpha": 0.0, "beta": 0.0, "gamma": 1.0}
    image = {"alpha": 3.0, "beta": 1.0, "gamma": 1.0, "graphs": "image"}
    assert found["V+E+S, graphs image, subspace"].items() >= image.items()
    assert found["V+E+S, dim 4"]["dim"] == 4
    others = {name: one for name, one in found.items() if not name.startswith(("V", "E", "S"))}
    others = dict(list(others.items())[4:])
    assert all(len(changes) == 2 for changes in others.values())
    searched = {name.partition(" ")[0] for name in others}
    assert searched == {"adapter", "centre", "levels", "temperature"}
    assert others["centre true"] == {"method": "graph", "centre": True}
    assert others["levels 2,3"]["levels"] == (2, 3)
    # what is set already is the row "graph"; dimensions are below the narrowest level's channels
    assert not {"V+E+S, dim 8", "V+E+S, dim 16", "adapter normalised"} & set(found)
    for changes in found.values():
        with_settings(Config(), changes)


def test_an_ablation_is_around_what_is_set():
    settings = {
        "preset": "ablation",
        "dim": 4,
        "temperature": 2.0,
        "centre": True,
        "levels": [2, 3],
    }
    found = variants(with_settings(Config(), settings), "detection", CHANNELS)
    assert "graph+kd" not in found
    assert {"V+E+S, dim 8", "centre false", "temperature 0.4", "temperature 10"} <= set(found)
    assert [name for name in found if name.startswith("levels")] == ["levels 2", "levels 3"]


def test_a_name_has_one_meaning():
    config = with_settings(Config(), {"preset": "ablation"})
    found = variants(config, "classification", CHANNELS)
    trained = [str(with_settings(config, changes)) for changes in found.values()]
    assert len(set(trained)) == len(trained)


@pytest.mark.parametrize("method", METHODS.names())
def test_ours_is_no_baseline(method: str):
    assert is_baseline({"method": method}) == (method.partition("+")[0] != "graph")


def test_an_unknown_method_is_refused_with_the_near_one():
    with pytest.raises(
        ConfigError, match=r"--methods 'ick': must be one of .*; did you mean 'ickd'"
    ):
        with_settings(Config(), {"methods": ["kd", "ick"]})
