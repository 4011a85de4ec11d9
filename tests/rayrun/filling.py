"""A search whose disk is full, or read-only, for a while."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import Command
from disks import Disk
from mlflow import MlflowClient
from records import json_lines, run_ids
from scenes import TRIALS, TUNE, Scene

from raygkd.engine import read_checkpoint
from raygkd.tracking.store import default_uri

MEGABYTES = 48
JOURNALS = ("trials.jsonl", "tracking.jsonl")
FULL, READ_ONLY = "No space left on device", "Read-only file system"


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
    lines = json_lines(folder / "trials.jsonl")
    return len([line for line in lines if line["trial"] == trial and "metrics" in line])


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


def fill(scene: Scene) -> Disturbed:
    """Let the disk be full in the first trial, read-only after the second, full after the last."""
    disk = Disk(scene.folder("disk"), MEGABYTES)
    scene.stack.callback(disk.end)
    command = scene.start(*TUNE, "--teacher", scene.teacher, "--output", disk.folder)
    [journal] = command.until(lambda: list(disk.folder.glob("runs/tune-*/trials.jsonl")))
    folder = journal.parent
    command.until(lambda: epochs_of(folder, 0) >= 2)
    ends = [broken(command, folder, disk.fill, FULL)]
    disk.make_room()

    command = scene.start("tune", "--resume", folder)
    command.until(lambda: epochs_of(folder, 1))
    ends.append(broken(command, folder, disk.protect, READ_ONLY))
    disk.allow()

    command = scene.start("tune", "--resume", folder)
    command.until(lambda: f"{TRIALS}/{TRIALS}" in command.err)
    ends.append(broken(command, folder, disk.fill, FULL))
    disk.make_room()

    command = scene.start("tune", "--resume", folder, "--json")
    uri = default_uri(disk.folder)
    return Disturbed(folder, ends, command, command.result(), MlflowClient(uri, uri))
