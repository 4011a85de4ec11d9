"""A search that is killed at random moments, in every way there is, ends as one that was not."""

from __future__ import annotations

from typing import Any

import pytest
from killing import Killed
from mlflow import MlflowClient
from records import curves, running, tracked
from scenes import Scenes

from raygkd.tracking.store import default_uri


@pytest.fixture(scope="module")
def killed(scenes: Scenes) -> Killed:
    return scenes["kill"].result()


@pytest.fixture(scope="module")
def reference(scenes: Scenes) -> dict[str, Any]:
    return scenes["undisturbed"].result()


def table(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the final table, without what a run is called."""
    return [{key: row[key] for key in row if key != "run_id"} for row in result["trials"]]


def test_the_final_table_is_that_of_an_undisturbed_search(
    killed: Killed, reference: dict[str, Any]
) -> None:
    assert table(killed.result) == table(reference), killed.moments
    assert {trial["status"] for trial in table(reference)} == {"finished", "stopped"}
    for name in ("params", "epochs", "val_score", "test_score"):
        assert killed.result["best"][name] == reference["best"][name], name
    assert killed.result["run"] == str(killed.folder)


def test_no_epoch_that_was_told_is_trained_again(killed: Killed) -> None:
    # a checkpoint is there before its epoch is told
    assert max(killed.behind) <= 0, (killed.behind, killed.moments)


def test_trials_that_were_over_are_not_started_again(killed: Killed) -> None:
    final = [entry["key"] for entry in tracked(killed.folder) if entry.get("op") == "start"]
    for over, starts in zip(killed.over, killed.starts, strict=True):
        for key in over:
            assert final.count(key) == starts.count(key), killed.moments
    assert len(killed.over[-1]) >= 2, killed.moments


def test_a_killed_search_goes_on_in_its_mlflow_runs(killed: Killed) -> None:
    client = MlflowClient(default_uri(killed.folder.parent.parent))
    found = {f"trial-{trial['number']:04d}": trial for trial in killed.result["trials"]}
    for ids in killed.run_ids:
        for key in ids.keys() & found.keys():
            assert ids[key] == found[key]["run_id"], killed.moments
        assert ids["search"] == killed.result["mlflow"]["parent_run_id"]
    for trial in found.values():
        scores = curves(client, trial["run_id"])["val_score"]
        assert set(scores) == set(range(1, trial["epochs"] + 1)), killed.moments
        assert scores[trial["epochs"]] == trial["val_score"]
    assert running(client) == []


def test_a_killed_driver_leaves_no_trial_and_ctrl_c_twice_ends_at_once(killed: Killed) -> None:
    assert killed.seconds["driver"] < 15
    assert killed.seconds["Ctrl-C twice"] < 3


def test_a_killed_trial_is_told_and_goes_on_by_itself(killed: Killed) -> None:
    [line] = [line for line in killed.warnings.splitlines() if "lost its process" in line]
    assert "(restart 1 of at most 3); it resumes after epoch" in line
    assert "Traceback" not in killed.warnings
