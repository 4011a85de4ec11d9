"""Folders in the layouts of VOC and COCO as data sets: splits, classes, faults."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets.voc
from layouts import coco_contents, write_coco, write_image, write_voc, write_xml

import raygkd.data.sets.digits_voc
from raygkd.data import Source, open_source
from raygkd.data.sets.voc import VOC_CLASSES
from raygkd.errors import ConfigError, DataError

CAT, DOG, OWN = ("cat", 1, 1, 9, 9), ("dog", 5, 5, 20, 20), ("crane", 3, 3, 8, 8)


def splits_of(source: Source) -> dict[str, set[str]]:
    """Return split -> names of the image files."""
    found: dict[str, set[str]] = {}
    for sample in source.samples:
        found.setdefault(sample.split, set()).add(Path(sample.origin).name)
    return found


def boxes_of(source: Source) -> dict[str, list[tuple]]:
    """Return image id -> class name and sides of each box."""
    return {
        sample.image_id: [
            (source.class_names[label], *sides)
            for label, sides in zip(sample.boxes.label, sample.boxes.xyxy.tolist())
        ]
        for sample in source.samples
        if sample.boxes is not None
    }


# Pascal VOC


def test_voc_images_with_none_one_and_many_boxes(tmp_path):
    root = write_voc(tmp_path, {"a": [], "b": [CAT], "c": [DOG, CAT, (*DOG, True)]})
    source = open_source("voc", root)
    assert source.task == "detection"
    assert boxes_of(source) == {
        "a": [],
        "b": [("cat", 0, 0, 9, 9)],
        "c": [("dog", 4, 4, 20, 20), ("cat", 0, 0, 9, 9), ("dog", 4, 4, 20, 20)],
    }
    assert [sample.boxes.difficult.tolist() for sample in source.samples][2] == [False, False, True]
    assert {sample.label for sample in source.samples} == {0}
    assert source.samples[0].read() == (root / "JPEGImages" / "a.jpg").read_bytes()
    assert source.warnings == ()


def test_voc_has_its_usual_classes_and_other_folders_those_of_their_training_images(tmp_path):
    usual = open_source("voc", write_voc(tmp_path / "VOC2007", {"a": [DOG]}))
    assert usual.class_names == VOC_CLASSES
    other = open_source("voc", write_voc(tmp_path / "pets", {"a": [DOG]}))
    assert other.class_names == ("dog",)
    lists = {"train": ["a"], "test": ["b"]}
    own = write_voc(tmp_path / "own", {"a": [DOG, OWN], "b": [CAT, DOG]}, lists)
    source = open_source("voc", own)
    assert source.class_names == ("crane", "dog")
    assert boxes_of(source)["b"] == [("dog", 4, 4, 20, 20)]
    assert source.warnings == (
        f"dropped 1 box of an unknown class, first in {own}/Annotations/b.xml object 1 ('cat')",
    )


@pytest.mark.parametrize(
    ("lists", "splits"),
    [
        (None, {"train": "abc"}),
        ({"train": "a", "val": "b", "test": "c"}, {"train": "a", "val": "b", "test": "c"}),
        (
            {"train": "a", "val": "b", "trainval": "ab", "cat_train": "c"},
            {"train": "a", "val": "b"},
        ),
        ({"trainval": "ab", "val": "b", "test": "c"}, {"train": "ab", "test": "c"}),
        ({"train": "ca"}, {"train": "ac"}),
    ],
)
def test_own_voc_folder_is_split_by_its_lists(tmp_path, lists, splits):
    root = write_voc(tmp_path, {"a": [CAT], "b": [CAT], "c": [CAT]}, lists)
    expected = {split: {f"{image_id}.jpg" for image_id in ids} for split, ids in splits.items()}
    assert splits_of(open_source("voc", root)) == expected


def test_voc_folder_without_a_training_list_is_refused(tmp_path):
    root = write_voc(tmp_path, {"a": [CAT]}, {"test": ["a"]})
    with pytest.raises(DataError, match=r"no train.txt or trainval.txt in '.*/ImageSets/Main'"):
        open_source("voc", root)


@pytest.mark.parametrize(
    ("lists", "empty"),
    [
        ({"train": "", "trainval": "ab"}, "train"),
        ({"trainval": "", "test": "b"}, "trainval"),
        ({"train": "a", "val": "", "test": "b"}, "val"),
        ({"train": "a", "val": "b", "test": ""}, "test"),
    ],
)
def test_empty_voc_list_is_refused(tmp_path, lists, empty):
    root = write_voc(tmp_path, {"a": [CAT], "b": [CAT]}, lists)
    with pytest.raises(DataError, match=rf"Main/{empty}.txt' lists no image: fill it or remove it"):
        open_source("voc", root)


@pytest.mark.parametrize("place", ["", "VOCdevkit", "VOCdevkit/photos", "photos", "VOC2007/.."])
def test_own_voc_folder_is_found_with_or_without_a_devkit_above(tmp_path, place):
    write_voc(tmp_path / "data" / place, {"a": [OWN]})
    assert boxes_of(open_source("voc", tmp_path / "data")) == {"a": [("crane", 2, 2, 8, 8)]}


def make_devkit(above: Path) -> None:
    for year, ids in (("2007", "abc"), ("2012", "def")):
        lists = {"train": ids[0], "val": ids[1], "trainval": ids[:2]}
        if year == "2007":
            lists["test"] = ids[2]
        write_voc(above / f"VOC{year}", {image_id: [CAT] for image_id in ids}, lists)


@pytest.mark.parametrize("above", ["VOCdevkit", ""])
@pytest.mark.parametrize(
    ("years", "train"),
    [
        (("2007", "2012"), {"a.jpg", "b.jpg", "d.jpg", "e.jpg"}),
        (("2007",), {"a.jpg", "b.jpg"}),
        (("2012",), {"d.jpg", "e.jpg"}),
    ],
)
def test_voc_trains_on_trainval_of_the_years_and_tests_on_2007(tmp_path, above, years, train):
    make_devkit(tmp_path / above)
    source = open_source("voc", tmp_path, years=years)
    assert splits_of(source) == {"train": train, "test": {"c.jpg"}}


def test_voc_year_folder_by_itself_keeps_its_own_splits(tmp_path):
    make_devkit(tmp_path)
    source = open_source("voc", tmp_path / "VOC2007")
    assert splits_of(source) == {"train": {"a.jpg"}, "val": {"b.jpg"}, "test": {"c.jpg"}}


def test_missing_voc_year_names_what_is_there(tmp_path):
    write_voc(tmp_path / "VOC2007", {"a": [CAT]}, {"trainval": ["a"]})
    with pytest.raises(DataError, match=r"no VOC2012 in '.*'.*--download.*--years 2007"):
        open_source("voc", tmp_path)
    assert splits_of(open_source("voc", tmp_path, years=("2007",))) == {"train": {"a.jpg"}}


def test_voc_year_without_trainval_is_refused(tmp_path):
    write_voc(tmp_path / "VOC2007", {"a": [CAT]})
    with pytest.raises(DataError, match=r"no ImageSets/Main/trainval.txt in '.*VOC2007'"):
        open_source("voc", tmp_path, years=("2007",))


@pytest.mark.parametrize("years", [(), ("2009",), ("2007", "07")])
def test_other_years_are_refused(tmp_path, years):
    with pytest.raises(ConfigError, match=r"--years '.*': must be 2007, 2012, or both"):
        open_source("voc", tmp_path, years=years)


def test_what_has_no_voc_layout_is_refused(tmp_path):
    (tmp_path / "JPEGImages").mkdir()
    with pytest.raises(DataError, match=r"no VOC layout in '.*': .* Annotations.*--download"):
        open_source("voc", tmp_path)
    with pytest.raises(DataError, match=r"no folder '.*nowhere'"):
        open_source("voc", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"voc needs --data-dir, .* --download fetches them"):
        open_source("voc")


def test_several_voc_folders_are_not_mixed(tmp_path):
    for name in ("one", "two"):
        write_voc(tmp_path / name, {"a": [OWN]})
    with pytest.raises(DataError, match=r"'.*one' and '.*two' are separate data sets"):
        open_source("voc", tmp_path)


def test_voc_image_may_have_any_known_suffix(tmp_path):
    write_voc(tmp_path, {"a": [CAT]})
    write_image(tmp_path / "JPEGImages" / "b.PNG", (60, 50))
    write_xml(tmp_path / "Annotations" / "b.xml", "b.jpg", [("dog", 1, 1, 60, 50)], (60, 50))
    source = open_source("voc", tmp_path, strict=True)
    assert splits_of(source) == {"train": {"a.jpg", "b.PNG"}}
    assert boxes_of(source)["b"] == [("dog", 0, 0, 60, 50)]


def break_annotation(root: Path) -> str:
    (root / "Annotations" / "b.xml").write_text("<annotation>")
    return "dropped 1 image without a readable annotation, first in {}/Annotations/b.xml (not XML"


def remove_annotation(root: Path) -> str:
    (root / "Annotations" / "b.xml").unlink()
    return (
        "dropped 1 image without a readable annotation, first in {}/Annotations/b.xml (cannot be "
        "read: No such file"
    )


def remove_image(root: Path) -> str:
    (root / "JPEGImages" / "b.jpg").unlink()
    return (
        "dropped 1 image whose file is missing, first in {}/Annotations/b.xml ({}/JPEGImages/b.jpg)"
    )


def enter_again(root: Path) -> str:
    (root / "ImageSets" / "Main" / "test.txt").write_text("a\n")
    return (
        "dropped 1 image listed more than once, first in {}/Annotations/a.xml ({}/JPEGImages/a.jpg)"
    )


def flatten_box(root: Path) -> str:
    write_xml(root / "Annotations" / "b.xml", "b.jpg", [("cat", 4, 4, 4, 3)])
    return "dropped 1 box with no area, first in {}/Annotations/b.xml object 1 (3 3 4 3)"


def resize_annotation(root: Path) -> str:
    write_xml(root / "Annotations" / "b.xml", "b.jpg", [CAT], (0, 0))
    return (
        "ignored 1 image size different from the file's, first in {}/Annotations/b.xml "
        "(0x0, the file"
    )


@pytest.mark.parametrize(
    "spoil",
    [
        break_annotation,
        remove_annotation,
        remove_image,
        enter_again,
        flatten_box,
        resize_annotation,
    ],
)
def test_voc_fault_is_counted_or_in_strict_mode_refused(tmp_path, spoil):
    images = {"a": [CAT], "b": [DOG], "c": [CAT]}
    root = write_voc(tmp_path, images, {"train": ["a", "b", "c"]})
    warning = spoil(root).format(root, root)
    source = open_source("voc", root)
    assert {"a", "c"} <= boxes_of(source).keys()
    assert len(source.warnings) == 1
    assert source.warnings[0].startswith(warning)
    with pytest.raises(DataError, match=r"Annotations/[ab]\.xml.*--strict") as caught:
        open_source("voc", root, strict=True)
    assert "\n" not in str(caught.value)


def test_data_set_without_a_box_to_train_on_is_refused(tmp_path):
    empty = write_voc(tmp_path / "empty", {"a": []})
    with pytest.raises(DataError, match=r"no usable training boxes in '.*empty': the training"):
        open_source("voc", empty)
    flat = write_voc(tmp_path / "flat", {"a": [("cat", 4, 4, 4, 3)]})
    with pytest.raises(DataError, match=r"no usable training boxes in '.*flat': dropped 1 box wi"):
        open_source("voc", flat)


@pytest.mark.parametrize("years", [("2007", "2012"), ("2012",)])
def test_voc_is_downloaded_where_it_is_missing(tmp_path, monkeypatch, years):
    make_devkit(tmp_path / "VOCdevkit")
    # the real function on small archives: only their addresses and digests differ
    archives = {}
    new = tmp_path / "new"
    new.mkdir()
    for key in ("2007", "2007-test", "2012"):
        # a whole archive that is there already is unpacked and not fetched again
        archive = new / f"{key}.tar"
        with tarfile.open(archive, "w") as file:
            file.add(tmp_path / "VOCdevkit" / f"VOC{key[:4]}", f"VOCdevkit/VOC{key[:4]}")
        archives[key] = {
            "url": "file:///gone.tar",
            "filename": archive.name,
            "md5": hashlib.md5(archive.read_bytes()).hexdigest(),
            "base_dir": f"VOCdevkit/VOC{key[:4]}",
        }
    monkeypatch.setattr(torchvision.datasets.voc, "DATASET_YEAR_DICT", archives)
    expected = splits_of(open_source("voc", tmp_path, years=years))
    assert splits_of(open_source("voc", new, download=True, years=years)) == expected
    for archive in new.glob("*.tar"):
        archive.unlink()
    # nothing is missing any more
    assert splits_of(open_source("voc", new, download=True, years=years)) == expected
    with pytest.raises(DataError, match=r"voc cannot be downloaded into '.*other'") as caught:
        open_source("voc", tmp_path / "other", download=True, years=years)
    assert "\n" not in str(caught.value)


# COCO

NAMES = {3: "dog", 1: "cat"}
IMAGES = {"a.jpg": [(1, 0, 0, 9, 9), (3, 4, 4, 8, 8, 1)], "b.jpg": []}
OTHERS = {"c.jpg": [(3, 0, 0, 9, 9)]}


def test_coco_layout_has_its_validation_images_for_the_test(tmp_path):
    annotations = tmp_path / "annotations"
    write_coco(
        annotations / "instances_train2017.json",
        tmp_path / "train2017",
        coco_contents(IMAGES, NAMES),
    )
    write_coco(
        annotations / "instances_val2017.json",
        tmp_path / "val2017",
        coco_contents(OTHERS, NAMES, first_id=9),
    )
    (annotations / "captions_train2017.json").write_text("{}")
    source = open_source("coco", tmp_path, strict=True)
    assert source.class_names == ("cat", "dog")
    assert splits_of(source) == {"train": {"a.jpg", "b.jpg"}, "test": {"c.jpg"}}
    assert boxes_of(source) == {
        "1": [("cat", 0, 0, 9, 9), ("dog", 4, 4, 12, 12)],
        "2": [],
        "9": [("dog", 0, 0, 9, 9)],
    }
    assert source.samples[0].boxes.crowd.tolist() == [False, True]


def test_coco_with_a_test_file_has_its_validation_images_for_validation(tmp_path):
    for number, split in enumerate(("train", "val", "test")):
        contents = coco_contents({f"{number}.jpg": [(1, 0, 0, 9, 9)]}, NAMES)
        write_coco(tmp_path / f"{split}.json", tmp_path / split, contents)
    assert splits_of(open_source("coco", tmp_path)) == {
        "train": {"0.jpg"},
        "val": {"1.jpg"},
        "test": {"2.jpg"},
    }


def test_images_of_equal_names_are_taken_from_the_folder_of_their_file(tmp_path):
    for split, image_id in (("train", 1), ("val", 2)):
        contents = coco_contents({"0.jpg": [(1, 0, 0, 9, 9)]}, NAMES, first_id=image_id)
        write_coco(tmp_path / "annotations" / f"instances_{split}.json", tmp_path / split, contents)
    origins = [sample.origin for sample in open_source("coco", tmp_path, strict=True).samples]
    assert origins == [str(tmp_path / "train" / "0.jpg"), str(tmp_path / "val" / "0.jpg")]


@pytest.mark.parametrize(
    ("file", "folder", "given"),
    [
        ("labels.json", "images", ""),
        ("labels.json", "", ""),
        ("labels.json", "images", "labels.json"),
        ("annotations/all.json", "photos", ""),
        ("annotations/instances_val2017.json", "val2017", ""),
        ("instances_train.json", "photos", ""),
    ],
)
def test_single_coco_file_is_all_for_training(tmp_path, file, folder, given):
    write_coco(tmp_path / file, tmp_path / folder, coco_contents(IMAGES, NAMES))
    (tmp_path / "a").mkdir()
    source = open_source("coco", tmp_path / given, strict=True)
    assert splits_of(source) == {"train": {"a.jpg", "b.jpg"}}


def test_coco_file_names_may_have_folders(tmp_path):
    contents = coco_contents({"deep/a.jpg": [(1, 0, 0, 9, 9)]}, NAMES)
    write_coco(tmp_path / "annotations" / "instances_train.json", tmp_path / "train", contents)
    write_coco(tmp_path / "more" / "labels.json", tmp_path / "more", contents)
    for root in (tmp_path, tmp_path / "more"):
        assert len(open_source("coco", root, strict=True).samples) == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"no training annotations in '.*': expected annotations/.*; found none"),
        (["one.json", "two.json"], r"no training annotations in '.*found one.json two.json"),
        (["val.json", "test.json"], "no training annotations in"),
        (
            ["instances_train2014.json", "instances_train2017.json"],
            "several files for one split in '.*': instances_train2014.json instances_train2017",
        ),
    ],
)
def test_unclear_coco_files_are_refused(tmp_path, files, message):
    for name in files:
        write_coco(tmp_path / name, tmp_path, coco_contents(IMAGES, NAMES))
    with pytest.raises(DataError, match=message):
        open_source("coco", tmp_path)


def test_missing_coco_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no folder '.*nowhere'"):
        open_source("coco", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="coco needs --data-dir"):
        open_source("coco")


def test_coco_without_its_images_is_refused(tmp_path):
    (tmp_path / "labels.json").write_text(json.dumps(coco_contents(IMAGES, NAMES)))
    with pytest.raises(DataError, match=r"contains images of '.*labels.json', such as 'a.jpg'"):
        open_source("coco", tmp_path)
    (tmp_path / "labels.json").write_text(json.dumps(coco_contents({}, NAMES)))
    with pytest.raises(DataError, match=r"labels.json' lists no images: fill its list 'images' "):
        open_source("coco", tmp_path)


def test_coco_classes_of_other_files_are_known_by_name(tmp_path):
    write_coco(tmp_path / "train.json", tmp_path / "train", coco_contents(IMAGES, NAMES))
    others = {"c.jpg": [(5, 0, 0, 9, 9), (6, 0, 0, 5, 5)]}
    contents = coco_contents(others, {5: "dog", 6: "cow"}, first_id=9)
    write_coco(tmp_path / "val.json", tmp_path / "val", contents)
    source = open_source("coco", tmp_path)
    assert source.class_names == ("cat", "dog")
    assert boxes_of(source)["9"] == [("dog", 0, 0, 9, 9)]
    assert source.warnings == (
        f"dropped 1 box of an unknown class, first in {tmp_path}/val.json image 9 annotation 101 "
        "('cow')",
    )


@pytest.mark.parametrize(
    ("spoil", "warning"),
    [
        (
            {"file_name": "gone.jpg"},
            "dropped 1 image whose file is missing, first in {0} image 2 (",
        ),
        ({"file_name": "a.jpg"}, "dropped 1 image listed more than once, first in {0} image 2 ("),
        ({"id": 1}, "dropped 1 image listed more than once, first in {0} image 1 (b.jpg)"),
        (
            {"width": 99},
            "ignored 1 image size different from the file's, first in {0} image 2 (99x30, the",
        ),
    ],
)
def test_coco_fault_is_counted_or_in_strict_mode_refused(tmp_path, spoil, warning):
    contents = coco_contents(IMAGES, NAMES)
    write_coco(tmp_path / "labels.json", tmp_path, contents)
    contents["images"][1] |= spoil
    (tmp_path / "labels.json").write_text(json.dumps(contents))
    source = open_source("coco", tmp_path)
    assert boxes_of(source)["1"] == [("cat", 0, 0, 9, 9), ("dog", 4, 4, 12, 12)]
    assert len(source.warnings) == 1
    assert source.warnings[0].startswith(warning.format(tmp_path / "labels.json"))
    with pytest.raises(DataError, match=r"labels\.json image [12]: .*--strict"):
        open_source("coco", tmp_path, strict=True)


# classes


def test_subset_of_classes_leaves_other_boxes_out_and_keeps_all_images(tmp_path):
    write_coco(tmp_path / "labels.json", tmp_path, coco_contents(IMAGES | OTHERS, NAMES))
    source = open_source("coco", tmp_path, classes=["dog"])
    assert source.class_names == ("dog",)
    assert boxes_of(source) == {
        "1": [("dog", 4, 4, 12, 12)],
        "2": [],
        "3": [("dog", 0, 0, 9, 9)],
    }
    assert source.samples[0].boxes.crowd.tolist() == [True]


def test_chosen_classes_keep_the_order_of_the_data_set(tmp_path):
    root = write_voc(tmp_path, {"a": [DOG, CAT, ("cow", 1, 1, 5, 5)]})
    source = open_source("voc", root, classes=("dog", "cat"))
    assert source.class_names == ("cat", "dog")
    assert source.samples[0].boxes.label.tolist() == [1, 0]


def test_unknown_classes_are_refused_with_near_ones(tmp_path):
    root = write_voc(tmp_path / "VOC2007", {"a": [DOG]})
    with pytest.raises(ConfigError, match=r"'persn': not a class of voc; did you mean 'person'\?"):
        open_source("voc", root, classes=["dog", "persn"])
    with pytest.raises(ConfigError, match="--classes: name at least one class"):
        open_source("voc", root, classes=[])
    with pytest.raises(ConfigError, match="digits has no boxes"):
        open_source("digits", classes=["1"])


# scenes of digits


def test_scenes_are_a_data_set_without_files():
    source = open_source("digits-voc")
    assert Counter(s.split for s in source.samples) == {"train": 800, "val": 100, "test": 300}
    assert source.class_names == tuple("0123456789")
    assert (source.task, source.warnings) == ("detection", ())
    assert len({sample.image_id for sample in source.samples}) == 1200


def test_scenes_are_not_written_for_classes_that_they_do_not_have(tmp_path):
    for classes in (["zebra"], []):
        with pytest.raises(ConfigError, match="--classes"):
            open_source("digits-voc", tmp_path / "scenes", classes=classes)
    assert not list(tmp_path.iterdir())


def test_scenes_in_a_folder_are_the_same_and_are_written_once(tmp_path, monkeypatch):
    scenes = {"train": 12, "val": 2, "test": 3}
    monkeypatch.setattr(raygkd.data.sets.digits_voc, "SCENES", scenes)
    expected = {sample.image_id: sample for sample in open_source("digits-voc").samples}
    for _ in range(2):
        source = open_source("digits-voc", tmp_path / "scenes", strict=True)
        assert (source.name, source.class_names) == ("digits-voc", tuple("0123456789"))
        for sample in source.samples:
            twin = expected[sample.image_id]
            assert sample.split == twin.split
            assert sample.read() == twin.read()
            assert np.array_equal(sample.boxes.xyxy, twin.boxes.xyxy)
            assert np.array_equal(sample.boxes.label, twin.boxes.label)
        assert len(source.samples) == len(expected) == 17
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]
