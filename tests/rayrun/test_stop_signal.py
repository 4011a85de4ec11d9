"""How runs are asked to stop and answer, through a folder and through an object store."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from servers import ObjectStore

from raygkd.rayrun.stop_signal import StopFolder, StopPoll
from raygkd.storage.atomic_files import Place, place
from raygkd.workflows.interrupts import Interrupts


def train(interrupts: Interrupts, names: list[str]) -> None:
    """Send Ctrl-C; then do what training processes do between two steps."""
    with interrupts.handled(), interrupts.waiting_for(lambda: names):
        os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            time.sleep(0.01)
            if interrupts.folder.is_asked():
                for name in names:
                    interrupts.folder.answer(name)


def interrupted(interrupts: Interrupts, *names: str) -> float:
    """Return the seconds from Ctrl-C until it is raised, while runs are under way."""
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        train(interrupts, list(names))
    return time.monotonic() - started


def test_a_run_is_asked_and_answers(folder: Place) -> None:
    stop = StopFolder(folder / "stop")
    assert not stop.is_asked()
    assert stop.answered() == set()
    stop.ask()
    assert stop.is_asked()
    assert stop.answered() == set()
    for name in ("0003", "student-alone"):
        stop.answer(name)
    assert stop.answered() == {"0003", "student-alone"}
    stop.withdraw()
    assert not stop.is_asked()
    assert stop.answered() == set()
    stop.withdraw()


def test_a_run_that_looks_is_told_and_remembers(folder: Place) -> None:
    stop = StopFolder(folder / "stop")
    assert not StopPoll(stop)()
    stop.ask()
    poll = StopPoll(stop)
    assert poll()
    stop.withdraw()
    assert poll()


def test_ctrl_c_waits_for_the_answers_and_leaves_nothing(folder: Place) -> None:
    told: list[str] = []
    interrupts = Interrupts(StopFolder(folder / "stop"), told.append)
    seconds = interrupted(interrupts, "0001", "0002")
    assert seconds < 7
    assert told == [
        "stopping after this step, with a checkpoint; press Ctrl-C again to stop at once"
    ]
    assert not (folder / "stop").exists()


def test_ctrl_c_does_not_wait_where_nothing_can_be_asked(
    object_store: ObjectStore, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for unwritable in (tmp_path / "file", place("s3://none/run")):
        told: list[str] = []
        interrupts = Interrupts(StopFolder(unwritable / "stop"), told.append)
        assert interrupted(interrupts, "0001") < 5
        assert len(told) == 2
        assert told[1].startswith("stopping at once: ")
        assert str(unwritable) in told[1]
