"""A search whose disk is full, or read-only, for a while; it ends as if nothing had happened."""

from __future__ import annotations

import json
from typing import Any

import pytest
from filling import JOURNALS, Broken, Disturbed
from records import curves, running
from scenes import Scenes


@pytest.fixture(scope="module")
def disturbed(scenes: Scenes) -> Disturbed:
    return scenes["fill"].result()


@pytest.fixture(scope="module")
def undisturbed(scenes: Scenes) -> dict[str, Any]:
    return scenes["undisturbed"].result()


@pytest.fixture(params=[0, 1, 2], ids=["full", "read-only", "full at the end"])
def end(request: pytest.FixtureRequest, disturbed: Disturbed) -> Broken:
    return disturbed.broken[request.param]


def test_a_search_that_cannot_write_ends_in_one_line(end: Broken, disturbed: Disturbed) -> None:
    assert end.code == 1, end.said
    [error] = [line for line in end.said if line.startswith("error: ")]
    assert error == end.said[-1]
    assert error.startswith(f"error: cannot write {disturbed.folder}/")
    assert error.endswith(
        f": {end.why}; once it can be written again, resume with: "
        f"raygkd tune --resume {disturbed.folder}"
    )
    progress = (
        "trials (1 at a time): ",
        "time to first step of a trial: ",
        "scoring models on the test split: ",
    )
    others = [line for line in end.said[:-1] if not line.startswith(progress)]
    assert all(line.startswith("warning: ") and "MLflow at " in line for line in others), others
    assert end.all_gone


def test_what_was_recorded_before_is_there(end: Broken) -> None:
    for name in JOURNALS:
        assert end.before[name]
        assert end.after[name].startswith(end.before[name])
        for line in end.after[name].splitlines():
            json.loads(line)
    assert end.leftovers == []
    assert end.epochs


def test_when_there_is_room_the_search_ends_as_if_undisturbed(
    disturbed: Disturbed, undisturbed: dict[str, Any]
) -> None:
    for name in ("number", "params", "epochs", "val_score", "status"):
        told = [trial[name] for trial in disturbed.result["trials"]]
        assert told == [trial[name] for trial in undisturbed["trials"]]
    for role in ("best", "teacher", "student_alone"):
        assert disturbed.result[role]["test_score"] == undisturbed[role]["test_score"]
    assert json.loads((disturbed.folder / "result.json").read_text()) == disturbed.result


def test_mlflow_has_everything_once_in_the_runs_of_the_beginning(disturbed: Disturbed) -> None:
    client, trials = disturbed.client, disturbed.result["trials"]
    keys = {f"trial-{trial['number']:04d}": trial["run_id"] for trial in trials}
    keys["search"] = disturbed.result["mlflow"]["parent_run_id"]
    for end in disturbed.broken:
        assert end.run_ids.items() <= keys.items()
    experiment = disturbed.result["mlflow"]["experiment_id"]
    found = {run.info.run_id for run in client.search_runs([experiment])}
    assert found == set(keys.values())
    for trial in trials:
        scores = curves(client, trial["run_id"])["val_score"]
        assert set(scores) == set(range(1, trial["epochs"] + 1))
        assert scores[trial["epochs"]] == trial["val_score"]
    assert running(client) == []
