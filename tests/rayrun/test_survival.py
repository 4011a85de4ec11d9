"""A search that is killed at random moments, in every way there is, ends as one that was not."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from commands import Command
from mlflow import MlflowClient
from records import curves, json_lines, running, tracked

from raygkd import tracking
from raygkd.engine import read_checkpoint

pytestmark = pytest.mark.slow
TRIALS, EPOCHS = 4, 24
# a search without a teacher to learn from is over when its trials are; one at a time they have one
# order
TUNE = (
    *("tune", "--dataset", "digits", "--limit-train", "256", "--student", "resnet8"),
    *("--method", "none", "--trials", TRIALS, "--epochs", EPOCHS, "--reduction-factor", "2"),
    *("--max-concurrent", "1", "--seed", "3", "--json"),
)
Start = Callable[..., Command]


@dataclass
class Killed:
    """A search that was killed several times.

    Attributes:
        folder: of its run.
        moments: how many lines the journal had, at least, and the seconds after that.
        behind: epochs that the journal had and the checkpoint of their trial had not, at each kill.
        over: trials that were over at each kill.
        starts: how often each had been started by then.
        run_ids: MLflow runs of the trials at each kill.
        seconds: until the command ended, or what ran its trials.
        warnings: what the last command wrote to standard error.
        result: of the last command.
    """

    folder: Path
    moments: list[tuple[int, float]]
    behind: list[int] = field(default_factory=list)
    over: list[set[str]] = field(default_factory=list)
    starts: list[list[str]] = field(default_factory=list)
    run_ids: list[dict[str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: str = ""
    result: dict[str, Any] = field(default_factory=dict)

    def look(self) -> None:
        """Note what there is."""
        entries = tracked(self.folder)
        ended = {entry["key"] for entry in entries if entry.get("status") == "FINISHED"}
        self.over.append({key for key in ended if key.startswith("trial-")})
        self.starts.append([entry["key"] for entry in entries if entry.get("op") == "start"])
        self.run_ids.append({e["key"]: e["run_id"] for e in entries if "run_id" in e})
        journal = lines(self.folder)
        number = journal[-1]["trial"]
        told = journal[-1]["metrics"]["epoch"] if "metrics" in journal[-1] else 0
        path = self.folder / "trials" / f"{number:04d}" / "checkpoint.pt"
        self.behind.append(int(told) - (read_checkpoint(path)["epoch"] if path.exists() else 0))


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a search's journal."""
    return json_lines(folder / "trials.jsonl")


@pytest.fixture(scope="module")
def reference(raygkd: Start, output: Path, untrained_teacher: Path) -> dict[str, Any]:
    """The search that nobody disturbs."""
    return raygkd(*TUNE, "--teacher", untrained_teacher, "--output", output).result()


@pytest.fixture(scope="module")
def killed(
    raygkd: Start, reference: dict[str, Any], untrained_teacher: Path, tmp_path_factory: Any
) -> Killed:
    output = tmp_path_factory.mktemp("killed")
    # the first trial trains all 24 epochs, the others are stopped after 1, 8 and 2: 39 lines in all
    windows = ((1, 10), (12, 20), (27, 29))
    moments = [(random.randint(*window), random.uniform(0.0, 0.3)) for window in windows]
    command = raygkd(*TUNE, "--teacher", untrained_teacher, "--output", output)
    [folder] = command.until(lambda: list((output / "runs").glob("tune-*")))
    search = Killed(folder, moments)

    def wait_for(command: Command, number: int, seconds: float) -> None:
        new = len(lines(folder)) + 1
        command.until(lambda: len(lines(folder)) >= max(number, new))
        time.sleep(seconds)

    # the driver alone: what it has started must see that by itself
    wait_for(command, *moments[0])
    command.send(signal.SIGKILL)
    search.seconds["driver"] = command.seconds_until_gone("ray::ResourceTrainable")
    search.look()

    command = raygkd("tune", "--resume", output)
    wait_for(command, *moments[1])
    command.send(signal.SIGINT)
    time.sleep(0.1)
    search.seconds["Ctrl-C twice"] = command.stop(signal.SIGINT)
    search.look()

    command = raygkd("tune", "--resume", output)
    wait_for(command, *moments[2])
    command.kill_all()
    command.wait()
    search.look()

    command = raygkd("tune", "--resume", output, "--json")
    wait_for(command, 0, 0.0)
    assert command.kill("ray::ResourceTrainable") == 1, command.err
    search.result = command.result()
    search.warnings = command.err
    return search


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
    client = MlflowClient(tracking.default_uri(killed.folder.parent.parent))
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
    assert "(1 of at most 3 times); it goes on after epoch" in line
