from __future__ import annotations

import dataclasses
import pickle
import shutil
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raygkd.data.parquet import open_table
from raygkd.data.prepare import prepare
from raygkd.errors import DataError


@pytest.fixture
def write(tmp_path):
    """Write columns to a Parquet file and return its path."""

    def write_columns(columns, *, metadata=None, name="foreign.parquet", **options):
        table = pa.table(columns).replace_schema_metadata(metadata)
        pq.write_table(table, tmp_path / name, **options)
        return str(tmp_path / name)

    return write_columns


def test_rows_come_back_in_the_order_asked(make_table):
    table = make_table(600)
    images = table.read(np.arange(600))
    rows = np.random.default_rng(0).permutation(600)[:100]
    assert table.read(rows) == [images[row] for row in rows]
    assert table.read(np.array([5, 5, 599])) == [images[5], images[5], images[599]]
    assert table.read(np.array([], dtype=np.int64)) == []


def test_only_the_row_groups_needed_are_read(write, encode_image):
    images = [encode_image(seed) for seed in range(4)]
    path = write({"image": images, "label": [0, 1, 0, 1]}, row_group_size=2, use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    table = open_table(path)
    with open(path, "r+b") as file:
        file.seek(column.data_page_offset)
        file.write(b"\0" * column.total_compressed_size)
    assert table.read(np.array([3, 2])) == [images[3], images[2]]
    with pytest.raises(DataError, match=r"cannot read '.*foreign\.parquet' as Parquet"):
        table.read(np.array([0]))


def test_table_survives_pickling(make_table):
    table = make_table(40)
    twin = pickle.loads(pickle.dumps(table))
    assert twin.read(np.array([3, 30])) == table.read(np.array([3, 30]))
    assert twin.fingerprint() == table.fingerprint()


def test_where_names_file_row_and_origin(tmp_path, make_source):
    prepare(make_source(600), str(tmp_path / "out"), shard_bytes=1)
    table = open_table(str(tmp_path / "out"))
    samples = {sample.read(): sample.origin for sample in make_source(600).samples}
    for row in (0, 255, 256, 599):
        origin = samples[table.read(np.array([row]))[0]]
        name = f"part-{row // 256:05d}.parquet"
        assert table.where(row) == f"{tmp_path}/out/{name} row {row % 256} ({origin})"


def test_foreign_file_needs_image_and_label_only(write, encode_image):
    images = [encode_image(seed, kind="JPEG") for seed in range(5)]
    path = write({"image": images, "label": pa.array([0, 2, 1, 2, 0], pa.int8())})
    table = open_table(path)
    assert table.class_names == ("class-0", "class-1", "class-2")
    assert table.labels.dtype == np.int64
    assert table.rows("train").tolist() == [0, 1, 2, 3, 4]
    assert table.read(np.array([4, 1])) == [images[4], images[1]]
    assert table.where(3) == f"{path} row 3"
    assert table.dataset == ""


def test_struct_images_of_hugging_face_are_read(write, encode_image):
    images = [encode_image(seed) for seed in range(3)]
    column = pa.array([{"bytes": image, "path": "x.png"} for image in images])
    table = open_table(write({"image": column, "label": [0, 1, 0]}))
    assert table.read(np.array([2, 0])) == [images[2], images[0]]


def test_null_image_reads_as_empty(write):
    table = open_table(write({"image": pa.array([None, b"x"], pa.binary()), "label": [0, 0]}))
    assert table.read(np.array([0, 1])) == [b"", b"x"]


def test_foreign_class_names_and_split_names(write):
    columns = {
        "image": [b"x"] * 5,
        "label": [0, 1, 1, 0, 1],
        "split": pa.array(["train", "valid", "validation", "val", "test"]).dictionary_encode(),
    }
    table = open_table(write(columns, metadata={"classes": "cat, dog"}))
    assert table.class_names == ("cat", "dog")
    assert [table.rows(split).tolist() for split in ("train", "val", "test")] == [
        [0],
        [1, 2, 3],
        [4],
    ]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"picture": [b"x"], "label": [0]}, r"columns picture \(binary\), label \(int64\); exp"),
        ({"picture": [b"x"], "target": [0]}, "expected image .* label"),
        ({"image": ["a.png"], "label": [0]}, r"columns image \(string\)"),
        ({"image": [{"path": "a.png"}], "label": [0]}, r"columns image \(struct"),
        ({"image": [b"x"], "label": ["cat"]}, r"label \(string\)"),
        ({"image": [b"x"], "label": [[0, 1]]}, r"label has lists \(multi-label data\); only"),
        ({"image": [b"x"], "label": [0.5]}, r"label has double \(regression data\); only one"),
        ({"image": [b"x"], "label": [0], "split": [1]}, r"split \(int64\)"),
        ({"image": [b"x"] * 3, "label": [0, 1, -2]}, r"row 2: label -2 \(allowed: 0 to 99999; -1"),
        (
            {"image": [b"x"] * 2, "label": [0, 0], "split": ["train", "hold"]},
            r"row 1: split 'hold' \(allowed: train, val, test",
        ),
        ({"image": [b"x"] * 2, "label": [0, 0], "split": ["train", None]}, "row 1: split None"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int8())}, "no rows in"),
    ],
)
def test_wrong_contents_are_one_line_that_names_the_file(write, columns, message):
    with pytest.raises(DataError, match=message) as caught:
        open_table(write(columns))
    assert "foreign.parquet" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_label_beyond_the_named_classes_tells_the_range(write):
    path = write({"image": [b"x"] * 3, "label": [0, 1, 2]}, metadata={"classes": "a,b"})
    with pytest.raises(DataError, match=r"foreign\.parquet' row 2: label 2 \(allowed: 0 to 1"):
        open_table(path)


def test_what_is_no_table_is_refused(tmp_path):
    (tmp_path / "words.parquet").write_text("words")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"cannot read '.*words\.parquet' as Parquet"):
        open_table(str(tmp_path / "words.parquet"))
    with pytest.raises(DataError, match=r"no \.parquet files in '.*empty'"):
        open_table(str(tmp_path / "empty"))
    with pytest.raises(DataError, match=r"no file or folder '.*nowhere'"):
        open_table(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_folder_with_a_shard_missing_is_incomplete(tmp_path, make_source, lost):
    prepare(make_source(600), str(tmp_path / "out"), shard_bytes=1)
    (tmp_path / "out" / f"part-{lost:05d}.parquet").unlink()
    with pytest.raises(DataError, match="is incomplete: its shards contain"):
        open_table(str(tmp_path / "out"))


def test_one_shard_can_be_opened_by_itself(tmp_path, make_source):
    prepare(make_source(600), str(tmp_path / "out"), shard_bytes=1)
    assert len(open_table(str(tmp_path / "out" / "part-00001.parquet"))) == 256


def test_files_of_one_folder_must_agree_on_classes(tmp_path, write):
    for name, classes in (("a.parquet", "x,y"), ("b.parquet", "y,x")):
        write({"image": [b"i"], "label": [0]}, metadata={"classes": classes}, name=name)
    with pytest.raises(DataError, match=r"b\.parquet' and '.*a\.parquet' have different class"):
        open_table(str(tmp_path))


def test_newer_format_is_refused(write):
    facts = {"raygkd": '{"version": 2, "dataset": "x", "classes": ["a"]}'}
    with pytest.raises(DataError, match="format version 2, but this version of raygkd reads 1"):
        open_table(write({"image": [b"x"], "label": [0]}, metadata=facts))


def test_fingerprint_does_not_depend_on_the_place(tmp_path, make_source):
    prepare(make_source(30), str(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    prints = {open_table(str(tmp_path / name)).fingerprint() for name in "ab"}
    assert len(prints) == 1


def test_fingerprint_sees_every_change(write):
    columns = {"image": [b"abc", b"abd"], "label": [0, 1], "split": ["train", "val"]}
    changes = [
        {},
        {"image": [b"abc", b"abe"]},
        {"label": [1, 1]},
        {"split": ["train", "test"]},
        {"image": [b"abc"], "label": [0], "split": ["train"]},
    ]
    prints = {open_table(write(columns | change)).fingerprint() for change in changes}
    prints.add(open_table(write(columns, metadata={"classes": "a,b"})).fingerprint())
    assert len(prints) == len(changes) + 1


def test_fingerprint_sees_one_changed_byte_in_shards(tmp_path, make_source):
    for name, first in (("a", 0), ("b", 1)):
        source = make_source(6)
        image = bytearray(source.samples[0].read())
        # the same length, another last byte
        image[-1] = first
        changed = dataclasses.replace(source.samples[0], read=partial(bytes, image))
        prepare(
            dataclasses.replace(source, samples=[changed, *source.samples[1:]]),
            str(tmp_path / name),
        )
    prints = {open_table(str(tmp_path / name)).fingerprint() for name in "ab"}
    assert len(prints) == 2
