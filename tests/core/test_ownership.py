"""A folder has one owner, which ends with its process; what killed processes left is removed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from raygkd.errors import StorageError
from raygkd.storage import ownership
from raygkd.storage.atomic_files import Place, modified, place, whole_file, write_text
from raygkd.storage.ownership import RECORD, Owned, is_abandoned, owned, owned_in_turn
from raygkd.storage.temporary import (
    YOUNG_SECONDS,
    remove_left_folders,
    remove_unfinished_files,
    temporary_folder,
)

HOLDS = """
import sys, time
from pathlib import Path
from raygkd.storage.ownership import owned
from raygkd.storage.temporary import temporary_folder
folder = Path(sys.argv[1])
with owned(folder / "run"), temporary_folder("test", parent=folder) as temporary:
    (temporary / "big").write_bytes(bytes(5000))
    print("owns", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that owns a folder, and has a temporary folder."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "owns\n"
        yield process
        process.kill()


def test_a_second_process_is_told_who_owns_it_and_a_killed_owner_is_none(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    told = rf"run: is under way since 20.*, by process {holder.pid} on {platform.node()} \(python\)"
    with pytest.raises(Owned, match=told), owned(run):
        pass
    assert not is_abandoned(run)
    assert remove_left_folders(tmp_path) == (0, 0)
    holder.kill()
    holder.wait()
    assert is_abandoned(run)
    [left] = tmp_path.glob("raygkd-tmp-*")
    assert remove_left_folders(tmp_path) == (0, 0), "it may have no lock yet"
    os.utime(left, (0, time.time() - 2 * YOUNG_SECONDS))
    assert remove_left_folders(tmp_path) == (1, 5000)
    with owned(run):
        assert not is_abandoned(run)
    assert list(run.iterdir()) == []
    with owned(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists(), "nothing was begun in it"


def test_who_comes_second_may_wait(tmp_path: Path) -> None:
    lines: list[str] = []
    order: list[str] = []

    def second() -> None:
        with owned_in_turn(tmp_path / "teacher", lines.append):
            order.append("second")

    waiting = threading.Thread(target=second)
    with owned(tmp_path / "teacher"):
        waiting.start()
        while not lines:
            time.sleep(0.01)
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]
    assert len(lines) == 1
    assert f"teacher, which is under way since {time.strftime('%Y')}" in lines[0]


def elsewhere(folder: Place, **changes: Any) -> None:
    """Write the record of an owner on another machine."""
    owner = replace(ownership._this_process(), machine="node7", boot=("other", ""), **changes)
    write_text(folder / RECORD, json.dumps(asdict(owner)))


def test_an_owner_on_another_node_is_told_while_it_renews_its_record(
    folder: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(ownership, "SETTLE_SECONDS", 0.05)
    elsewhere(folder)
    is_over = threading.Event()

    def renew() -> None:
        while not is_over.wait(1.0):
            elsewhere(folder)

    beat = threading.Thread(target=renew)
    beat.start()
    try:
        with pytest.raises(Owned, match=r"by process [0-9]+ on node7"), owned(folder):
            pass
    finally:
        is_over.set()
        beat.join()
    monkeypatch.setattr(ownership, "DEAD_SECONDS", 1.5)
    started = time.monotonic()
    with owned(folder):
        assert time.monotonic() - started < 10
        assert json.loads((folder / RECORD).read_text())["machine"] == platform.node()
    assert not (folder / RECORD).exists()


def test_where_there_are_no_locks_the_record_decides(
    holder: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(file: int, how: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(Owned, match=f"by process {holder.pid} "), owned(tmp_path / "run"):
        pass
    holder.kill()
    holder.wait()
    with owned(tmp_path / "run"):
        pass


def test_an_owner_renews_its_record(folder: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(ownership, "SETTLE_SECONDS", 0.0)
    with owned(folder):
        write_text(folder / "begun", "")
        first = modified(folder / RECORD)
        deadline = time.monotonic() + 10
        while modified(folder / RECORD) == first:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert (folder / "begun").exists()


def test_two_at_once_in_an_object_store_are_not_both_owners(
    folder: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(folder, Path):
        pytest.skip("files have locks")
    write = ownership._write

    def and_another(path: Any, owner: Any) -> None:
        write(path, owner)
        elsewhere(path, token="other")

    monkeypatch.setattr(ownership, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(ownership, "_write", and_another)
    with pytest.raises(Owned, match="on node7"), owned(folder):
        pass
    assert json.loads((folder / RECORD).read_text())["token"] == "other"


def test_unfinished_files_are_removed_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials" / ".model.pt.123.tmp").write_bytes(bytes(70))
    others = [tmp_path / name for name in (".hidden", "a.1.tmp", ".b.tmp")]
    for path in others:
        path.touch()
    assert remove_unfinished_files(tmp_path) == (1, 70)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(others)


def test_a_temporary_folder_ends_with_its_block(tmp_path: Path) -> None:
    with temporary_folder("test", parent=tmp_path) as folder:
        (folder / "file").touch()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.EACCES, "Permission denied"),
        (errno.EPERM, "Operation not permitted"),
        (errno.EIO, "Input/output error"),
        (errno.ESTALE, "Stale file handle"),
    ],
)
def test_a_folder_that_was_lost_is_told_in_one_line(tmp_path: Path, number: int, text: str) -> None:
    path = tmp_path / "result.json"

    def fail(temporary: Path) -> None:
        raise OSError(number, os.strerror(number), str(temporary))

    assert _told(path, fail) == f"cannot write {path}: {text}"
    with pytest.raises(OSError, match="elsewhere"), whole_file(path):
        raise OSError(number, os.strerror(number), "/elsewhere/input")


def _told(path: Path, write: Callable[[Path], None]) -> str:
    with pytest.raises(StorageError) as raised, whole_file(path) as temporary:
        write(temporary)
    return str(raised.value)


def test_a_folder_that_was_removed_is_told_in_one_line(tmp_path: Path) -> None:
    import torch

    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "model.pt"
    path.parent.rmdir()
    expected = f"cannot write {path}: No such file or directory"
    assert _told(path, lambda temporary: torch.save({}, temporary)) == expected
    assert _told(path, lambda temporary: temporary.write_text("")) == expected


def test_a_place_in_a_store_can_be_owned(folder: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "SETTLE_SECONDS", 0.0)
    run = place(folder / "run")
    with owned(run), pytest.raises(Owned, match=f"by process {os.getpid()} "), owned(run):
        pass
    assert not (run / RECORD).exists()
