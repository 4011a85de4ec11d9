from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from raygkd.data import decode, open_source, sample_sheet, table_info
from raygkd.data.parquet import open_table
from raygkd.data.prepare import prepare
from raygkd.errors import DataError


def test_info_counts_rows_classes_sizes_and_formats(tmp_path, make_tree, encode_image):
    root = make_tree({"train/a": 3, "train/b": 1, "test/b": 2})
    (root / "train" / "a" / "wide.jpg").write_bytes(encode_image(size=(40, 20), kind="JPEG"))
    prepare(open_source("imagefolder", root), str(tmp_path / "out"))
    info = table_info(open_table(str(tmp_path / "out")))
    assert info["splits"] == {"train": 5, "val": 0, "test": 2}
    assert info["classes"] == {
        "a": {"train": 4, "val": 0, "test": 0},
        "b": {"train": 1, "val": 0, "test": 2},
    }
    assert info["width"] == {"min": 12, "median": 12, "max": 40}
    assert info["height"] == {"min": 12, "median": 12, "max": 20}
    assert info["formats"] == {"PNG": 6, "JPEG": 1}
    assert info["bytes"] == os.path.getsize(tmp_path / "out" / "part-00000.parquet")
    assert (info["images"], info["sampled"], info["bad"], info["uniform_size"]) == (7, 7, 0, False)


def test_info_looks_at_a_sample_only(make_table):
    info = table_info(make_table(50), sample=10)
    assert (info["sampled"], info["uniform_size"], info["images"]) == (10, True, 50)


def test_sheet_has_a_row_of_enlarged_images_for_each_class(tmp_path):
    prepare(open_source("digits"), str(tmp_path / "digits"))
    table = open_table(str(tmp_path / "digits"))
    path = tmp_path / "sheet.png"
    sample_sheet(table, str(path), columns=6)
    sheet = np.asarray(Image.open(path).convert("L"))
    tile = sheet[48 : 48 + 64, 176 : 176 + 64]
    pixels = tile[::8, ::8]
    assert (tile == pixels.repeat(8, axis=0).repeat(8, axis=1)).all()
    zeros = table.rows("train")[table.labels[table.rows("train")] == 0]
    assert any((decode(image)[0].numpy() == pixels).all() for image in table.read(zeros))
    assert sorted(os.listdir(tmp_path)) == ["digits", "sheet.png"]


def test_sheet_is_bounded_and_tells_what_it_leaves_out(tmp_path, make_table):
    sizes = []
    for classes in (1, 2, 3):
        sample_sheet(make_table(30), str(tmp_path / "sheet.png"), columns=4, max_classes=classes)
        sizes.append(Image.open(tmp_path / "sheet.png").size)
    assert {width for width, _ in sizes} == {2 * 16 + 160 + 4 * 68 - 4}
    assert sizes[0][1] < sizes[1][1] < sizes[2][1]


def test_unwritable_sheet_is_one_line(tmp_path, make_table):
    with pytest.raises(DataError, match=r"cannot write '.*nowhere/sheet\.png'"):
        sample_sheet(make_table(3), str(tmp_path / "nowhere" / "sheet.png"))


def test_sheet_leaves_broken_images_out(tmp_path, broken_table):
    sample_sheet(broken_table(10, range(10)), str(tmp_path / "sheet.png"))
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert (sheet[48:, 176:] == 255).all()
