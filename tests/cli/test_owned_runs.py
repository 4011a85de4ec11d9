"""A run has one process; one that is killed before anything was begun leaves nothing to resume."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from outcomes import Ran

from raygkd.storage.ownership import owned


def test_a_second_process_of_a_run_is_refused_in_one_line(
    refused: Callable[..., str], good: tuple[str, ...], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with owned(output / "runs" / "tune-x"):
        (output / ".seen").touch()
        told = refused("tune", *good, "--output", output, "--name", "x")
    run = output / "runs" / "tune-x"
    assert told.startswith(f"error: {run}: is under way since 20")
    assert f"by process {os.getpid()} on " in told


def test_a_run_that_was_killed_before_it_began_is_told(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    run = tmp_path / "out" / "runs" / "tune-x"
    run.mkdir(parents=True)
    (run / ".owner").touch()
    for given in (tmp_path / "out", run):
        told = refused("tune", "--resume", given)
        assert "nothing was begun before it was killed; run the command again" in told


def test_a_run_that_was_moved_is_resumed_where_it_is(
    raygkd: Callable[..., Ran], good: tuple[str, ...], tmp_path: Path
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    options = ("--output", old, "--name", "x", "--student", "resnet8", "--method", "none")
    ran = raygkd("train", *good, *options, "--epochs", "2")
    assert ran.code == 0, ran.err
    run = old / "runs" / "train-x"
    # as it is after a kill
    (run / "result.json").unlink()
    (run / "model.pt").unlink()
    shutil.move(old, new)
    # in a process of its own, since MLflow remembers places
    command = [sys.executable, "-m", "raygkd", "train", "--resume", str(new), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"the run was moved here from {old}" in done.stderr
    assert not old.exists()
    assert (new / "runs" / "train-x" / "model.pt").exists()
    assert str(old) not in done.stdout
