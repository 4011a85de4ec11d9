"""What a killed process leaves in MLflow, and a store whose output folder was moved or copied."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient

from raygkd.storage.ownership import owned
from raygkd.tracking import logged_models
from raygkd.tracking.evaluation_runs import Origin
from raygkd.tracking.left_runs import close_left_runs
from raygkd.tracking.logged_models import LoggedModel
from raygkd.tracking.model_registry import registered
from raygkd.tracking.store import connect, default_uri
from raygkd.tracking.tags import FOLDER_TAG
from raygkd.tracking.tracker import Tracker
from raygkd.workflows.model_locator import origin_of

MOST_CALLS = 20


class Killed(BaseException):
    """The process ends here."""


class Dying:
    """MLflow's client in a process that is killed after some calls.

    Args:
        client: the client.
        calls: how many it still makes.
    """

    def __init__(self, client: MlflowClient, calls: int):
        self._client, self._calls = client, calls

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if not self._calls:
                raise Killed
            self._calls -= 1
            return getattr(self._client, name)(*arguments, **options)

        return call


def saved(path: Path, *others: Any) -> None:
    """Write a model's folder, which takes torch seconds."""
    path.mkdir()
    (path / "MLmodel").write_text("flavors: {}\n")


def model_of(tracker: Tracker, name: str) -> LoggedModel | None:
    image = np.zeros((1, 3, 8, 8), np.float32)
    return tracker.model("search", None, image, register_as=name, description="", tags={})


def test_a_run_has_one_version_whenever_it_was_killed(
    uri: str, experiment: str, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logged_models, "_save_model", saved)
    for calls in range(MOST_CALLS):
        name = f"killed-after-{calls}"
        tracker = Tracker(uri, experiment, tmp_path / f"{calls}.jsonl")
        tracker.start("search", name)
        run_id = tracker.run_id("search")
        tracker._client = Dying(tracker._client, calls)
        is_killed = False
        try:
            model_of(tracker, name)
        except Killed:
            is_killed = True
        tracker._client = client
        tracker.close("KILLED")

        resumed = Tracker(uri, experiment, tmp_path / f"{calls}.jsonl")
        resumed.start("search", name)
        found = model_of(resumed, name)
        resumed.close()
        assert found is not None
        assert (found.version, found.alias) == ("1", "champion")
        [version] = client.search_model_versions(f"name = '{name}'")
        assert version.run_id == run_id
        assert client.get_model_version_by_alias(name, "champion").run_id == run_id
        assert [*client.get_registered_model(name).aliases] == ["champion"]
        assert run_id is not None
        [output] = client.get_run(run_id).outputs.model_outputs
        assert found.uri == f"models:/{output.model_id}"
        models = client.search_logged_models([experiment])
        of_run = [one for one in models if one.source_run_id == run_id]
        assert [str(one.status) for one in of_run].count("READY") == 1
        assert all(str(one.status) in ("READY", "FAILED") for one in of_run)
        if not is_killed:
            break
    assert calls > 8, "it was never killed"
    assert not is_killed


OWNS = """
import os, sys
from pathlib import Path
from raygkd.storage.ownership import owned
with owned(Path(sys.argv[1])):
    os._exit(9)
"""


def test_runs_of_killed_processes_are_closed_and_no_others(
    tracker: Tracker, uri: str, experiment: str, client: MlflowClient, tmp_path: Path
) -> None:
    dead, alive, gone = (tmp_path / name for name in ("dead", "alive", "gone"))
    subprocess.run([sys.executable, "-c", OWNS, str(dead)], check=False, timeout=60)
    for key, folder in {"dead": dead, "trial": dead, "alive": alive, "gone": gone}.items():
        tracker.start(key, key, tags={FOLDER_TAG: str(folder)})
    tracker.start("foreign", "foreign")
    ids = {key: tracker.run_id(key) for key in ("dead", "trial", "alive", "gone", "foreign")}
    with owned(alive):
        assert close_left_runs(uri, experiment) == 2
        statuses = {key: client.get_run(run_id).info.status for key, run_id in ids.items()}
    assert statuses == {
        **{"dead": "KILLED", "trial": "KILLED"},
        **dict.fromkeys(("alive", "gone", "foreign"), "RUNNING"),
    }


@pytest.fixture
def output(store: Path, tmp_path: Path) -> Path:
    """An output folder with a store that was made there, a run and a registered model."""
    output = tmp_path / "out put"
    experiment = connect(default_uri(output), "raygkd", _made(output))
    tracker = Tracker(default_uri(output), experiment, output / "runs" / "tune-a" / "track.jsonl")
    folder = output / "runs" / "tune-a"
    tracker.start("search", "search", tags={FOLDER_TAG: str(folder)}, texts={"config.yaml": "a: 1"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logged_models, "_save_model", saved)
        assert model_of(tracker, "digits") is not None
    run_id = tracker.run_id("search")
    tracker.close()
    (folder / "model.pt").touch()
    uri = default_uri(output)
    tracked = {"tracking_uri": uri, "parent_run_id": run_id}
    result = {"run": str(folder), "seconds": 1.0, "mlflow": tracked}
    (folder / "result.json").write_text(json.dumps(result))
    return output


def _made(output: Path) -> Path:
    output.mkdir()
    return output


def places(output: Path) -> str:
    """Return all that a store knows, as text."""
    with closing(sqlite3.connect(output / "mlflow.db")) as store:
        return "\n".join(store.iterdump())


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_a_store_is_usable_where_its_folder_is_now(
    output: Path, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    new = tmp_path / "new" / "out"
    new.parent.mkdir()
    before = places(output)
    (shutil.move if how == "moved" else shutil.copytree)(output, new)
    version = registered("models:/digits@champion", default_uri(new))
    assert version.folder == str(new / "runs" / "tune-a")
    assert str(output) not in places(new)
    assert output.as_uri() not in places(new)
    client = MlflowClient(default_uri(new), default_uri(new))
    assert Path(client.download_artifacts(version.run_id, "config.yaml")).read_text() == "a: 1"
    [model] = client.search_model_versions("name = 'digits'")
    assert model.source.startswith(f"{new.as_uri()}/")
    model_file = version.folder + "/model.pt"
    found = origin_of(version.folder, Path(model_file), tracking_uri=None, output=str(new))
    assert found == Origin(uri=default_uri(new), run_id=version.run_id)
    [line] = [one.getMessage() for one in caplog.records if "was moved or copied" in one.msg]
    assert line.startswith(f"the output folder was moved or copied from {output}: ")
    if how == "copied":
        assert places(output) == before
    connect(default_uri(new), "raygkd", new)
    assert sum("was moved or copied" in one.msg for one in caplog.records) == 1


def test_a_store_with_its_artifacts_elsewhere_on_purpose_stays_as_it_is(tmp_path: Path) -> None:
    ours, theirs = _made(tmp_path / "ours"), _made(tmp_path / "theirs")
    uri = default_uri(ours)
    connect(uri, "raygkd", theirs)
    before = places(ours)
    os.makedirs(ours / "runs")
    connect(uri, "raygkd", theirs)
    connect(uri, "raygkd", ours)
    assert places(ours) == before
