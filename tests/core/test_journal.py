"""Journals, in a file and in an object store."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from servers import ObjectStore

from raygkd.storage.atomic_files import Place, make_folder, place
from raygkd.storage.journal import PART_BYTES, open_journal
from raygkd.storage.object_store import RemotePath


@pytest.fixture
def remote(object_store: ObjectStore, tmp_path: Path) -> Place:
    return place(f"{object_store.url}/{tmp_path.name}/run.jsonl")


@pytest.fixture
def path(folder: Place) -> Place:
    make_folder(folder)
    return folder / "run.jsonl"


def sizes(path: Place) -> list[int]:
    """Return how many bytes each part has."""
    return [len(part.read_bytes()) for part in sorted(path.iterdir())]


def test_a_journal_that_nobody_began_has_no_lines(path: Place) -> None:
    assert open_journal(path).lines() == []


def test_lines_are_there_as_soon_as_they_are_appended(path: Place) -> None:
    journal, reader = open_journal(path), open_journal(path)
    for number in range(5):
        journal.append(f"line {number}")
        assert reader.lines() == [f"line {n}" for n in range(number + 1)]


def test_another_process_goes_on(path: Place) -> None:
    open_journal(path).append("first")
    journal = pickle.loads(pickle.dumps(open_journal(path)))
    journal.append("second")
    journal.append("third")
    assert open_journal(path).lines() == ["first", "second", "third"]


def test_a_line_that_a_crash_has_cut_off_makes_room_for_the_next(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    open_journal(path).append("first")
    with path.open("a") as file:
        file.write("seco")
    journal = open_journal(path)
    assert journal.lines() == ["first"]
    journal.append("second")
    assert path.read_text() == "first\nsecond\n"


def test_a_full_part_is_followed_by_another(remote: Place) -> None:
    journal = open_journal(remote)
    wanted = [f"{number} ".ljust(PART_BYTES // 10, "x") for number in range(25)]
    for line in wanted:
        journal.append(line)
    assert journal.lines() == wanted
    assert len(sizes(remote)) == 3
    assert max(sizes(remote)) < 2 * PART_BYTES


def test_what_arrives_late_takes_no_line_away(remote: Place) -> None:
    dead, resumed = open_journal(remote), open_journal(remote)
    dead.append("first")
    resumed.append("second")
    dead.append("late")
    resumed.append("third")
    assert open_journal(remote).lines() == ["first", "late", "second", "third"]


def test_ctrl_c_in_the_middle_of_a_write_takes_no_line_away(
    remote: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = open_journal(remote)
    journal.append("first")
    write = RemotePath.write_bytes

    def interrupted(path: RemotePath, content: bytes) -> None:
        write(path, content)
        raise KeyboardInterrupt

    monkeypatch.setattr(RemotePath, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        journal.append("second")
    monkeypatch.setattr(RemotePath, "write_bytes", write)
    journal.append("third")
    assert journal.lines() == ["first", "second", "third"]
    assert len(sizes(remote)) == 2
