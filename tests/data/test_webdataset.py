"""Images in tar files, in the layout of webdataset."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from layouts import encode_image, tar_members, write_tar

from raygkd.data import open_source
from raygkd.errors import DataError


def test_images_have_the_labels_and_bytes_of_their_keys(tmp_path):
    write_tar(tmp_path / "a-000.tar", tar_members("2", "10"))
    write_tar(tmp_path / "a-001.tar", tar_members("2", first=2))
    source = open_source("webdataset", tmp_path, strict=True)
    assert source.class_names == ("2", "10")
    assert [(s.label, s.read()) for s in source.samples] == [
        (0, encode_image(0)), (1, encode_image(1)), (0, encode_image(2)),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["{}-00.tar", "imagenet-{}_0.tar", "{}/000.tar"])
def test_splits_are_in_the_names(tmp_path, name):
    for number, split in enumerate(("train", "val", "test")):
        write_tar(tmp_path / name.format(split), tar_members("1", "2", first=3 * number))
    source = open_source("webdataset", tmp_path, strict=True)
    assert Counter(s.split for s in source.samples) == {"train": 2, "val": 2, "test": 2}


def test_labels_in_json_and_class_names_in_a_file(tmp_path):
    content = {"x/a.jpg": encode_image(kind="JPEG"), "x/a.json": json.dumps({"label": 1}).encode()}
    write_tar(tmp_path / "a.tar", content)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    source = open_source("webdataset", tmp_path, strict=True)
    assert (source.class_names, source.samples[0].label) == (("cat", "dog"), 1)
    (tmp_path / "classes.txt").write_text("cat\n")
    with pytest.raises(DataError, match="label '1' is not among the 1 classes of"):
        open_source("webdataset", tmp_path)


def test_rewritten_tar_file_is_another_version(tmp_path):
    path = write_tar(tmp_path / "a.tar", tar_members("1", "2"))
    before = open_source("webdataset", tmp_path).version
    write_tar(path, tar_members("1", "2", "1"))
    assert open_source("webdataset", tmp_path).version != before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a.png": b""}, "a.tar/a: no label; every image needs a member .cls"),
        ({"a.png": b"", "a.json": b"{"}, r"a.tar/a.json: cannot be read: "),
        ({"a.png": b"", "a.json": b'{"label": [1, 2]}'}, r"label \[1, 2\]; only one class"),
        ({"a.png": b"", "a.cls": b"0.5"}, "such as 0.5 .regression data"),
    ],
)
def test_faulty_members_are_one_line(tmp_path, content, message):
    write_tar(tmp_path / "a.tar", content)
    with pytest.raises(DataError, match=message) as caught:
        open_source("webdataset", tmp_path)
    assert "\n" not in str(caught.value)


def test_label_without_image_is_counted(tmp_path):
    write_tar(tmp_path / "a.tar", tar_members("1", "2") | {"lost.cls": b"1"})
    (warning,) = open_source("webdataset", tmp_path).warnings
    assert warning == f"dropped 1 image whose file is missing, first in {tmp_path}/a.tar/lost"


def test_cut_off_and_compressed_files_are_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar", tar_members(*"123456789"))
    whole = path.read_bytes()
    for size in (1300, 2048, 100):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"a\.tar' (is truncated|cannot be read as a tar file)"):
            open_source("webdataset", tmp_path)
    path.rename(tmp_path / "a.tar.gz")
    with pytest.raises(DataError, match=r"a\.tar\.gz' is compressed, .*; decompress it to \.tar"):
        open_source("webdataset", tmp_path)
