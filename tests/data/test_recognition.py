"""Which data set a folder is, from the files in it."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from layouts import (
    coco_contents,
    tar_members,
    write_coco,
    write_image,
    write_table,
    write_tar,
    write_voc,
    write_yolo,
)

from raygkd.data.recognition import recognise
from raygkd.errors import ConfigError, DataError

CONTENTS = coco_contents({"a.jpg": [(1, 0, 0, 9, 9)]}, {1: "cat"})


def folders(root):
    write_image(root / "cat" / "a.jpg")
    write_image(root / "dog" / "a.jpg")


def split_folders(root):
    write_coco(root / "train" / "_annotations.coco.json", root / "train", CONTENTS)


def roboflow(root):
    write_image(root / "train" / "images" / "a.jpg")
    (root / "data.yaml").write_text("train: ../train/images\nnames: [cat]\n")


def parquet(root):
    pq.write_table(pa.table({"image": [b""], "label": [0]}), root / "a.parquet")


def hub(root):
    (root / "data").mkdir()
    pq.write_table(pa.table({"image": [b""], "label": [0]}), root / "data" / "train.parquet")


LAYOUTS = {
    "imagefolder": [folders],
    "voc": [lambda root: write_voc(root, {"a": []}), lambda root: write_voc(root / "x", {"a": []})],
    "coco": [
        split_folders,
        lambda root: write_coco(root / "annotations/instances_train.json", root / "x", CONTENTS),
    ],
    "yolo": [lambda root: write_yolo(root, {"train": {"a": ""}}, ["cat"]), roboflow],
    "csv": [lambda root: write_table(root / "t.csv", [["image", "label"], ["a.png", "x"]], "x")],
    "webdataset": [lambda root: write_tar(root / "train-0.tar", tar_members("1", "2"))],
    "parquet": [parquet],
    "hf": [hub],
}


@pytest.mark.parametrize(
    ("name", "write"), [(name, write) for name, writers in LAYOUTS.items() for write in writers]
)
def test_each_layout_is_recognised(tmp_path, name, write):
    write(tmp_path)
    assert recognise(str(tmp_path))[0] == name


def test_files_are_recognised_too(tmp_path):
    write_coco(tmp_path / "labels.json", tmp_path, CONTENTS)
    write_table(tmp_path / "t.csv", [["image", "label"], ["a.png", "x"]])
    assert recognise(str(tmp_path / "labels.json"))[0] == "coco"
    assert recognise(str(tmp_path / "t.csv")) == ("csv", "t.csv")
    assert recognise("s3://bucket/shards") == ("parquet", "a URL")


def test_several_kinds_at_once_are_refused(tmp_path):
    write_voc(tmp_path, {"a": []})
    write_coco(tmp_path / "labels.json", tmp_path, CONTENTS)
    with pytest.raises(DataError, match=r"may be coco .* or voc .*; choose one with --dataset"):
        recognise(str(tmp_path))


def test_nothing_known_is_refused(tmp_path):
    write_image(tmp_path / "a.jpg")
    (tmp_path / "t.csv").write_text("x,y\n1,2\n")
    with pytest.raises(DataError, match=r"is none of the known data sets \(.*imagefolder"):
        recognise(str(tmp_path))
    with pytest.raises(DataError, match=r"no file or folder '.*gone'"):
        recognise(str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match="--dataset auto needs --data-dir"):
        recognise(None)
