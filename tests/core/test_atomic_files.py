"""Files that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from raygkd.storage.atomic_files import whole_file


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_a_file_appears_at_the_end_of_the_block(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert names(tmp_path) == ["result.json"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), whole_file(path) as temporary:
        temporary.write_text("half \udc00", encoding="utf-8")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["result.json"]


def test_a_folder_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError), whole_file(tmp_path / "taken") as temporary:
        temporary.write_text("new")
    assert names(tmp_path) == ["taken"]
