"""A search whose disk is full, or read-only, for a while; it ends as if nothing had happened."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import Command
from disks import Disk
from mlflow import MlflowClient
from records import curves, running, tracked

from raygkd import tracking
from raygkd.engine import read_checkpoint

pytestmark = pytest.mark.slow
TRIALS, EPOCHS = 3, 20
TUNE = (
    *("tune", "--dataset", "digits", "--limit-train", "256", "--student", "resnet8"),
    *("--method", "none", "--seed", "3", "--trials", TRIALS, "--epochs", EPOCHS),
    *("--max-concurrent", "1"),
)
MEGABYTES = 48
JOURNALS = ("trials.jsonl", "tracking.jsonl")
FULL, READ_ONLY = "No space left on device", "Read-only file system"
Start = Callable[..., Command]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    disk = Disk(tmp_path_factory.mktemp("disk"), MEGABYTES)
    yield disk
    disk.end()


@dataclass(frozen=True)
class Broken:
    """A command that the disk has ended.

    Attributes:
        code: its exit code.
        seconds: from the fault to the end.
        said: on standard error after the fault.
        why: as the system says it.
        all_gone: whether no process is left.
        before, after: the run's journals at the fault and at the end.
        leftovers: files that were not finished.
        epochs: of each checkpoint.
        run_ids: key -> MLflow run, as far as known.
    """

    code: int
    seconds: float
    said: list[str]
    why: str
    all_gone: bool
    before: dict[str, str]
    after: dict[str, str]
    leftovers: list[Path]
    epochs: list[int]
    run_ids: dict[str, str]


@dataclass(frozen=True)
class Disturbed:
    """A search that a disk has ended three times, and its result.

    Attributes:
        broken: its ends.
        client: of its MLflow store.
    """

    folder: Path
    broken: list[Broken]
    command: Command
    result: dict[str, Any]
    client: MlflowClient


def journals(folder: Path) -> dict[str, str]:
    """Return the journals of a run; what is not there yet is empty."""
    paths = {name: folder / name for name in JOURNALS}
    return {name: path.read_text() if path.exists() else "" for name, path in paths.items()}


def epochs_of(folder: Path, trial: int) -> int:
    """Return how many epochs of a trial are in the journal."""
    lines = [json.loads(line) for line in journals(folder)["trials.jsonl"].splitlines(True)[:-1]]
    return len([line for line in lines if line["trial"] == trial and "metrics" in line])


def run_ids(folder: Path) -> dict[str, str]:
    """Return key -> MLflow run."""
    return {entry["key"]: entry["run_id"] for entry in tracked(folder) if "run_id" in entry}


def broken(command: Command, folder: Path, fault: Callable[[], None], why: str) -> Broken:
    """Let a fault come over a command, and wait for its end."""
    before, said = journals(folder), command.err
    fault()
    started = time.monotonic()
    code = command.wait(60)
    return Broken(
        code=code,
        seconds=time.monotonic() - started,
        said=command.err.removeprefix(said).splitlines(),
        why=why,
        all_gone=command.gone(10),
        before=before,
        after=journals(folder),
        leftovers=list(folder.rglob("*.tmp")),
        epochs=[read_checkpoint(path)["epoch"] for path in folder.rglob("checkpoint.pt")],
        run_ids=run_ids(folder),
    )


@pytest.fixture(scope="module")
def undisturbed(raygkd: Start, untrained_teacher: Path, output: Path) -> dict[str, Any]:
    return raygkd(*TUNE, "--teacher", untrained_teacher, "--output", output, "--json").result()


@pytest.fixture(scope="module")
def disturbed(disk: Disk, raygkd: Start, untrained_teacher: Path) -> Disturbed:
    """Full in the first trial, read-only in the second, full after the last."""
    command = raygkd(*TUNE, "--teacher", untrained_teacher, "--output", disk.folder)
    [journal] = command.until(lambda: list(disk.folder.glob("runs/tune-*/trials.jsonl")))
    folder = journal.parent
    command.until(lambda: epochs_of(folder, 0) >= 2)
    ends = [broken(command, folder, disk.fill, FULL)]
    disk.make_room()

    command = raygkd("tune", "--resume", folder)
    command.until(lambda: epochs_of(folder, 1))
    ends.append(broken(command, folder, disk.protect, READ_ONLY))
    disk.allow()

    command = raygkd("tune", "--resume", folder)
    command.until(lambda: f"{TRIALS}/{TRIALS}" in command.err)
    ends.append(broken(command, folder, disk.fill, FULL))
    disk.make_room()

    command = raygkd("tune", "--resume", folder, "--json")
    uri = tracking.default_uri(disk.folder)
    return Disturbed(folder, ends, command, command.result(), MlflowClient(uri, uri))


@pytest.fixture(params=[0, 1, 2], ids=["full", "read-only", "full at the end"])
def end(request: pytest.FixtureRequest, disturbed: Disturbed) -> Broken:
    return disturbed.broken[request.param]


def test_a_search_that_cannot_write_ends_in_one_line(end: Broken, disturbed: Disturbed) -> None:
    assert end.code == 1, end.said
    [error] = [line for line in end.said if line.startswith("error: ")]
    assert error == end.said[-1]
    assert error.startswith(f"error: cannot write {disturbed.folder}/")
    assert error.endswith(
        f": {end.why}: when it can be written again, go on with: "
        f"raygkd tune --resume {disturbed.folder}"
    )
    progress = ("trials (1 at a time): ", "time to first step of a trial: ")
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
