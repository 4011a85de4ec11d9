"""COCO's format as other programs write it: ids, and a file in each split's folder."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from layouts import coco_contents, write_coco

from raygkd.data import open_source
from raygkd.errors import DataError

IMAGES = {"a.jpg": [(1, 0, 0, 9, 9)], "b.jpg": [(2, 4, 4, 8, 8), (1, 0, 0, 5, 5)]}
NAMES = {1: "cat", 2: "dog"}


def with_ids(contents, image, category):
    """Return contents whose ids were changed by two functions."""
    return {
        "images": [entry | {"id": image(entry["id"])} for entry in contents["images"]],
        "annotations": [
            entry
            | {"image_id": image(entry["image_id"]), "category_id": category(entry["category_id"])}
            for entry in contents["annotations"]
        ],
        "categories": [entry | {"id": category(entry["id"])} for entry in contents["categories"]],
    }


@pytest.mark.parametrize(
    ("image", "category"),
    [
        ("img-{}".format, int),
        (str, str),
        (float, lambda key: key / 2),
        (lambda key: key if key == 1 else "1", lambda key: key if key == 1 else "1"),
    ],
)
def test_ids_of_any_kind_are_matched_as_written(tmp_path, image, category):
    contents = with_ids(coco_contents(IMAGES, NAMES), image, category)
    write_coco(tmp_path / "labels.json", tmp_path, contents)
    source = open_source("coco", tmp_path, strict=True)
    assert source.class_names == ("cat", "dog")
    first, second = (sample.boxes for sample in source.samples)
    assert (first.label.tolist(), second.label.tolist()) == ([0], [1, 0])


@pytest.mark.parametrize("name", ["_annotations.coco.json", "labels.json", "annotations/x.json"])
def test_a_file_in_the_folder_of_each_split(tmp_path, name):
    for number, split in enumerate(("train", "valid", "test")):
        contents = coco_contents(IMAGES, NAMES, first_id=number)
        write_coco(tmp_path / split / name, tmp_path / split, contents)
    source = open_source("coco", tmp_path, strict=True)
    assert Counter(s.split for s in source.samples) == {"train": 2, "val": 2, "test": 2}


def test_folders_of_splits_without_training_or_with_two_files_are_refused(tmp_path):
    write_coco(tmp_path / "valid" / "a.json", tmp_path / "valid", coco_contents(IMAGES, NAMES))
    with pytest.raises(DataError, match=r"no training annotations in .*found valid/a.json"):
        open_source("coco", tmp_path)
    write_coco(tmp_path / "valid" / "b.json", tmp_path / "valid", coco_contents(IMAGES, NAMES))
    with pytest.raises(DataError, match=r"several files for one split .*valid/a.json valid/b.json"):
        open_source("coco", tmp_path)


def test_file_names_may_start_with_the_folder_of_the_split(tmp_path):
    contents = coco_contents(IMAGES, NAMES)
    for image in contents["images"]:
        image["file_name"] = f"train/{image['file_name']}"
    write_coco(tmp_path / "train" / "labels.json", tmp_path, contents)
    assert len(open_source("coco", tmp_path, strict=True).samples) == 2


def test_categories_of_one_name_are_one_class_and_reported(tmp_path):
    contents = coco_contents(IMAGES, {1: "cat", 2: "cat", 3: "Cat "})
    write_coco(tmp_path / "labels.json", tmp_path, contents)
    source = open_source("coco", tmp_path)
    assert source.class_names == ("cat", "Cat ")
    assert [warning.partition(", first")[0] for warning in source.warnings] == [
        "merged 1 class with the same name as another",
        "found 1 class whose name differs from another's only by case or spaces",
    ]
    with pytest.raises(DataError, match=r"'cat'\); correct it"):
        open_source("coco", tmp_path, strict=True)


def test_null_is_no_id(tmp_path):
    contents = coco_contents(IMAGES, NAMES)
    contents["images"][0]["id"] = None
    write_coco(tmp_path / "labels.json", tmp_path, contents)
    assert json.loads((tmp_path / "labels.json").read_text())["images"][0]["id"] is None
    with pytest.raises(DataError, match=r"images\[0\] has no 'id' \(a number or string\)"):
        open_source("coco", tmp_path)
