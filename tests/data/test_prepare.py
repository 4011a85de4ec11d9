from __future__ import annotations

import os

import numpy as np
import pyarrow.parquet as pq
import pytest

from raygkd.data import Source, open_source
from raygkd.data.parquet import open_table
from raygkd.data.prepare import prepare
from raygkd.errors import DataError


def test_every_image_is_written_once_with_its_label_and_split(tmp_path, make_source):
    source = make_source(300, splits=("test", "train", "val"))
    summary = prepare(source, str(tmp_path / "out"))
    table = open_table(str(tmp_path / "out"))
    written = {
        (int(label), int(split), image)
        for label, split, image in zip(table.labels, table.splits, table.read(np.arange(300)))
    }
    codes = {"train": 0, "val": 1, "test": 2}
    assert written == {(s.label, codes[s.split], s.read()) for s in source.samples}
    assert len(table) == len(written) == summary["images"] == 300
    assert summary["splits"] == {"train": 99, "val": 99, "test": 102}
    assert summary["bytes"] == sum(len(s.read()) for s in source.samples)
    assert (summary["bad"], summary["shards"], summary["classes"]) == (0, 1, 3)


def test_images_are_in_mixed_order_and_splits_apart(tmp_path, make_source):
    prepare(make_source(120, splits=("train", "test")), str(tmp_path / "out"))
    table = open_table(str(tmp_path / "out"))
    assert (np.diff(table.splits) >= 0).all()
    assert (np.diff(table.labels[:60]) == 0).sum() > 5
    for first, rows in zip(table.units.first, table.units.rows):
        assert len(set(table.splits[first : first + rows])) == 1


def test_row_groups_and_shards_are_bounded(tmp_path, make_source):
    source = make_source(700)
    total = sum(len(sample.read()) for sample in source.samples)
    summary = prepare(source, str(tmp_path / "out"), shard_bytes=total // 4)
    table = open_table(str(tmp_path / "out"))
    assert table.units.rows.tolist() == [256, 256, 188]
    assert summary["shards"] == len(table.files) == 3
    assert table.units.file.tolist() == [0, 1, 2]


def test_two_runs_write_the_same_bytes(tmp_path, make_source):
    for name in ("a", "b"):
        prepare(make_source(50), str(tmp_path / name))
    files = [(tmp_path / name / "part-00000.parquet").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_class_names_and_data_set_are_in_the_schema(tmp_path):
    prepare(open_source("digits"), str(tmp_path / "out"))
    schema = pq.read_schema(tmp_path / "out" / "part-00000.parquet")
    assert schema.names == ["image", "label", "split", "origin"]
    assert b'"dataset": "digits"' in schema.metadata[b"raygkd"]
    table = open_table(str(tmp_path / "out"))
    assert (table.dataset, table.class_names[:2], len(table)) == ("digits", ("0", "1"), 1797)


def test_progress_counts_every_image(tmp_path, make_source):
    seen = []
    prepare(make_source(150), str(tmp_path / "out"), progress=lambda *at: seen.append(at))
    assert seen == [(done, 150) for done in range(1, 151)]


def test_broken_image_stops_with_its_path_and_leaves_nothing(tmp_path, make_tree, encode_image):
    root = make_tree({"a": 3})
    jpeg = encode_image(kind="JPEG", size=(64, 64))
    (root / "a" / "half.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    with pytest.raises(DataError, match=r"photos/a/half\.jpg: not a complete image.*--skip-bad"):
        prepare(open_source("imagefolder", root), str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["photos"]


def test_skip_bad_leaves_broken_images_out_and_counts_them(tmp_path, make_tree):
    root = make_tree({"a": 3})
    (root / "a" / "words.png").write_text("words")
    (root / "a" / "empty.png").write_bytes(b"")
    summary = prepare(open_source("imagefolder", root), str(tmp_path / "out"), skip_bad=True)
    assert (summary["images"], summary["bad"]) == (3, 2)
    assert sorted(line.split("/")[-1] for line in summary["bad_examples"]) == [
        "empty.png: not a complete image (it is empty)",
        "words.png: not a complete image (not a known image format)",
    ]
    assert len(open_table(str(tmp_path / "out"))) == 3


def test_unreadable_file_is_a_broken_image(tmp_path, make_tree):
    root = make_tree({"a": 2})
    source = open_source("imagefolder", root)
    (root / "a" / "0.png").unlink()
    with pytest.raises(DataError, match=r"a/0\.png: cannot be read \(No such file"):
        prepare(source, str(tmp_path / "out"))


def test_only_broken_images_are_an_error(tmp_path, make_source):
    with pytest.raises(DataError, match="all 2 images of toy are unreadable, such as image"):
        prepare(make_source(2, broken=(0, 1)), str(tmp_path / "out"), skip_bad=True)
    assert os.listdir(tmp_path) == []


def test_existing_content_is_refused_and_kept(tmp_path, make_source):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    with pytest.raises(DataError, match=r"'.*full' is not empty"):
        prepare(make_source(3), str(tmp_path / "full"))
    with pytest.raises(DataError, match="mine' is a file"):
        prepare(make_source(3), str(tmp_path / "full" / "mine"))
    assert (tmp_path / "full" / "mine").read_text() == "kept"


def test_empty_folder_is_filled(tmp_path, make_source):
    (tmp_path / "empty").mkdir()
    prepare(make_source(3), str(tmp_path / "empty"))
    assert len(open_table(str(tmp_path / "empty"))) == 3
    assert os.listdir(tmp_path) == ["empty"]


def test_relative_destination_is_under_the_working_folder(tmp_path, make_source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(make_source(3), "deep/out/")
    assert (tmp_path / "deep" / "out" / "part-00000.parquet").is_file()


def test_unwritable_destination_is_one_line(tmp_path, make_source):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write to '.*file/out'") as caught:
        prepare(make_source(3), str(tmp_path / "file" / "out"))
    assert "\n" not in str(caught.value)


def test_unknown_scheme_is_refused(make_source):
    with pytest.raises(DataError, match="cannot reach 'ftp://host/x'"):
        prepare(make_source(3), "ftp://host/x")


def test_source_without_images_is_refused(tmp_path):
    with pytest.raises(DataError, match="nothing has no images"):
        prepare(Source("nothing", ("a",), []), str(tmp_path / "out"))


class Killed(BaseException):
    """Stands for a signal: nothing handles it."""


def test_interrupted_write_continues_after_the_last_complete_shard(tmp_path, make_source):
    source = make_source(900, splits=("train", "test"), broken=(5, 17, 600))
    options = {"skip_bad": True, "shard_bytes": 1}
    expected = prepare(source, str(tmp_path / "whole"), **options)

    def stop(done, total):
        if done == 700:
            raise Killed

    with pytest.raises(Killed):
        prepare(source, str(tmp_path / "out"), progress=stop, **options)
    shards = sorted((tmp_path / "out.incomplete").glob("*.parquet"))
    assert shards
    before = [(path.stat().st_ino, path.read_bytes()) for path in shards]
    seen = []
    summary = prepare(
        source, str(tmp_path / "out"), progress=lambda *at: seen.append(at), **options
    )
    assert 256 <= seen[0][0] <= 700
    assert seen[-1] == (900, 900)
    assert summary | {"path": ""} == expected | {"path": ""}
    names = sorted(os.listdir(tmp_path / "whole"))
    assert sorted(os.listdir(tmp_path / "out")) == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for path, (inode, _) in zip(shards, before):
        assert (tmp_path / "out" / path.name).stat().st_ino == inode
    assert len(open_table(str(tmp_path / "out"))) == 897


def test_interrupted_write_of_other_data_restarts(tmp_path, make_source):
    def stop(done, total):
        if done == 600:
            raise Killed

    with pytest.raises(Killed):
        prepare(make_source(700), str(tmp_path / "out"), shard_bytes=1, progress=stop)
    seen = []
    prepare(
        make_source(650), str(tmp_path / "out"), shard_bytes=1, progress=lambda *at: seen.append(at)
    )
    assert seen[0] == (1, 650)
    assert len(open_table(str(tmp_path / "out"))) == 650


def test_two_writers_of_one_folder_do_not_mix(tmp_path, make_source):
    def second(done, total):
        if done == 1:
            prepare(make_source(3), str(tmp_path / "out"))

    with pytest.raises(DataError, match=r"another process is writing '.*out': wait until"):
        prepare(make_source(3), str(tmp_path / "out"), progress=second)
