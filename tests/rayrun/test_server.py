"""A search whose MLflow server hangs: for a while, and until the search is over."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hanging import LONG, SHORT, Hung, Silent, outages
from mlflow import MlflowClient
from records import curves, running
from scenes import Scenes
from servers import Server


@pytest.fixture(scope="module")
def server(scenes: Scenes) -> Server:
    return scenes["hang"].result()[0]


@pytest.fixture(scope="module")
def hung(scenes: Scenes) -> Hung:
    return scenes["hang"].result()[1]


@pytest.fixture(scope="module")
def silent(scenes: Scenes) -> Silent:
    return scenes["hang"].result()[2]


def check_record(result: dict[str, Any], server: Server, epochs: int) -> None:
    """MLflow has what a result says, everything once, and no other run of that search."""
    client = MlflowClient(server.uri, server.uri)
    place = result["mlflow"]
    parent = f"tags.`mlflow.parentRunId` = '{place['parent_run_id']}'"
    children = client.search_runs([place["experiment_id"]], parent)
    trials = {trial["run_id"]: trial for trial in result["trials"]}
    assert sorted(run.info.run_id for run in children) == sorted(trials)
    for run in children:
        trial = trials[run.info.run_id]
        assert run.data.params == {name: str(value) for name, value in trial["params"].items()}
        scores = curves(client, run.info.run_id)["val_score"]
        assert set(scores) == set(range(1, epochs + 1))
        assert scores[epochs] == trial["val_score"]
    metrics = client.get_run(place["parent_run_id"]).data.metrics
    assert metrics["best_test_score"] == result["best"]["test_score"]
    registered = result["champion"]["registered"]
    version = client.get_model_version(registered["name"], registered["version"])
    assert version.run_id == place["parent_run_id"]
    assert running(client) == []


def test_a_search_goes_on_while_its_server_hangs(hung: Hung, server: Server) -> None:
    assert hung.over >= 1
    [warning] = outages(hung.command)
    assert warning.startswith(f"warning: MLflow at {server.uri} does not answer (")
    assert warning.endswith(f"everything is kept in {hung.folder}/tracking.jsonl")
    assert hung.command.err.count("warning: ") == 1
    assert "Traceback" not in hung.command.err


def test_a_server_that_answers_again_has_everything_once(hung: Hung, server: Server) -> None:
    check_record(hung.result, server, LONG)
    assert json.loads((hung.folder / "result.json").read_text()) == hung.result


def test_a_search_ends_although_its_server_hangs(silent: Silent, server: Server) -> None:
    outage, model, end = [
        line for line in silent.command.err.splitlines() if line.startswith("warning: ")
    ]
    assert outage.startswith(f"warning: MLflow at {server.uri} does not answer (")
    assert model.startswith(
        f"warning: MLflow at {server.uri} did not receive the model of run 'search': "
    )
    assert end == (
        f"warning: MLflow at {server.uri} has not received everything; the rest is kept in "
        f"{silent.folder}/tracking.jsonl and is sent when this run is resumed"
    )
    assert silent.first["champion"]["registered"] is None
    assert "Traceback" not in silent.command.err


def test_the_folder_of_a_finished_search_sends_what_is_left(silent: Silent, server: Server) -> None:
    assert silent.after == silent.before
    for name in ("number", "params", "epochs", "val_score", "status"):
        told = [trial[name] for trial in silent.second["trials"]]
        assert told == [trial[name] for trial in silent.first["trials"]]
    assert silent.second["best"]["test_score"] == silent.first["best"]["test_score"]
    check_record(silent.second, server, SHORT)
