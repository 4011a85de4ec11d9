"""Runs whose output is in an object store: an S3 server of this machine."""

from __future__ import annotations

import json
from typing import Any

import pytest
from mlflow import MlflowClient
from records import curves, running
from scenes import Scenes
from servers import SECRET
from storing import Stored, epochs, lines


@pytest.fixture(scope="module")
def stored(scenes: Scenes) -> Stored:
    return scenes["keep"].result()


@pytest.fixture(scope="module")
def undisturbed(scenes: Scenes) -> dict[str, Any]:
    return scenes["undisturbed"].result()


def test_ctrl_c_ends_a_search_and_tells_the_url_to_go_on_with(stored: Stored) -> None:
    assert stored.code == 130
    assert stored.seconds < 15
    # in the middle of the epoch
    assert stored.stopped["parts"][0] is not None
    assert f"resume with: raygkd tune --resume {stored.run}\n" in stored.interrupted.err
    assert "Traceback" not in stored.said


def test_a_killed_search_goes_on_where_nothing_is_but_the_store(
    stored: Stored, undisturbed: dict[str, Any]
) -> None:
    for name in ("number", "params", "epochs", "val_score", "status"):
        told = [trial[name] for trial in stored.searched["trials"]]
        assert told == [trial[name] for trial in undisturbed["trials"]], stored.told
    for role in ("best", "teacher", "student_alone"):
        assert stored.searched[role]["test_score"] == undisturbed[role]["test_score"]
    assert stored.searched["run"] == stored.run
    # what was told before it was killed was not trained again
    told = epochs(stored.store, stored.run)
    assert told[: len(stored.told)] == stored.told
    assert len(set(told)) == len(told)


def test_mlflow_has_everything_once_and_its_artifacts_in_the_store(stored: Stored) -> None:
    client = MlflowClient(stored.server.uri, stored.server.uri)
    for trial in stored.searched["trials"]:
        scores = curves(client, trial["run_id"])["val_score"]
        assert set(scores) == set(range(1, trial["epochs"] + 1))
    assert running(client) == []
    names = {key.rpartition("/")[2] for key in stored.store.objects("mlflow/")}
    assert {"config.yaml", "search.png", "MLmodel"} <= names


def test_two_workers_train_on_streamed_shards_of_the_store(stored: Stored) -> None:
    run = stored.trained["run"]
    assert [entry["epoch"] for entry in lines(stored.store, run, "metrics.jsonl")] == [1, 2]
    found = stored.store.objects(run.removeprefix(f"{stored.store.url}/"))
    names = {key.rpartition("/")[2] for key in found}
    assert {"checkpoint.pt", "config.yaml", "model.pt", "result.json"} <= names
    result = next(found[key] for key in found if key.endswith("/result.json"))
    assert json.loads(result) == stored.trained


def test_nothing_is_left_on_the_machine(stored: Stored) -> None:
    assert list((stored.machine / "cwd").iterdir()) == []
    own = (".pt", ".jsonl", ".parquet", ".yaml")
    assert [path for path in stored.machine.rglob("*") if path.suffix in own] == []


def test_no_credential_is_told_or_stored(stored: Stored) -> None:
    assert SECRET not in stored.said
    objects = stored.store.objects()
    assert [key for key, content in objects.items() if SECRET.encode() in content] == []
    assert SECRET.encode() not in (stored.server.folder / "mlflow.db").read_bytes()
