"""Data sets in YOLO's format, compared with its definition written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from layouts import SIZE, write_image, write_yolo

from raygkd.data import Source, open_source
from raygkd.errors import DataError

WIDTH, HEIGHT = SIZE
BOX = "0 0.5 0.5 0.2 0.4"
POLYGON = "1 0.1 0.1 0.4 0.1 0.4 0.5 0.1 0.5"


def boxes(source: Source) -> dict[str, list[tuple]]:
    """Return split and name of each image -> class name and rounded sides of its boxes."""
    return {
        f"{sample.split}/{Path(sample.origin).name}": [
            (source.class_names[label], *np.round(sides, 3).tolist())
            for label, sides in zip(sample.boxes.label, sample.boxes.xyxy)
        ]
        for sample in source.samples
    }


def test_boxes_polygons_empty_and_missing_label_files(tmp_path):
    train = {"a": f"{BOX}\n\n1 0.1 0.1 0.2 0.2\n", "b": "", "c": POLYGON, "d": None}
    root = write_yolo(tmp_path, {"train": train, "val": {"e": BOX}}, ["cat", "dog"])
    source = open_source("yolo", root)
    assert source.class_names == ("cat", "dog")
    assert boxes(source) == {
        "train/a.jpg": [
            ("cat", 0.4 * WIDTH, 0.3 * HEIGHT, 0.6 * WIDTH, 0.7 * HEIGHT),
            ("dog", 0, 0, 0.2 * WIDTH, 0.2 * HEIGHT),
        ],
        "train/b.jpg": [],
        "train/c.jpg": [("dog", 0.1 * WIDTH, 0.1 * HEIGHT, 0.4 * WIDTH, 0.5 * HEIGHT)],
        "train/d.jpg": [],
        "val/e.jpg": [("cat", 0.4 * WIDTH, 0.3 * HEIGHT, 0.6 * WIDTH, 0.7 * HEIGHT)],
    }
    missing = (
        f"found 1 image without a label file, taken to have no objects, first in {root}/images"
    )
    assert [warning.startswith(missing) for warning in source.warnings] == [True]


@pytest.mark.parametrize(
    ("yaml", "files"),
    [
        ("train: [images/train, images/more]", "abc"),
        ("train: images/*/", "abcv"),
        ("train: images/train/*.jpg", "ab"),
        ("train: {root}/images/more", "c"),
        ("train: list.txt", "ac"),
        ("train: ../images/train", "ab"),
        ("path: images\ntrain: train", "ab"),
        ("path: /elsewhere/data\ntrain: images/train", "ab"),
        ("train: images/train\ntest:", "ab"),
    ],
)
def test_images_are_those_of_folders_globs_and_lists(tmp_path, yaml, files):
    splits = {"train": {"a": BOX, "b": BOX}, "more": {"c": BOX}, "val": {"v": BOX}}
    root = write_yolo(tmp_path / "set", splits, ["cat"])
    (root / "list.txt").write_text(f"./images/train/a.jpg\n{root}/images/more/c.jpg\n")
    (root / "data.yaml").write_text(yaml.format(root=root) + "\nnames: {0: cat}\n")
    source = open_source("yolo", root)
    assert "".join(sorted(Path(sample.origin).stem for sample in source.samples)) == files
    assert all(len(sample.boxes) == 1 for sample in source.samples)


def test_validation_has_the_usual_names_and_the_yaml_may_be_given(tmp_path):
    root = write_yolo(tmp_path, {"train": {"a": BOX}, "valid": {"b": BOX}}, ["cat"])
    source = open_source("yolo", root / "data.yaml")
    assert sorted(boxes(source)) == ["train/a.jpg", "val/b.jpg"]


def test_labels_may_be_beside_the_images_and_names_in_a_text_file(tmp_path):
    write_image(tmp_path / "photos" / "a.jpg")
    (tmp_path / "photos" / "a.txt").write_text(BOX)
    (tmp_path / "data.yaml").write_text("train: photos\nnc: 2\n")
    assert open_source("yolo", tmp_path, strict=True).class_names == ("class-0", "class-1")
    root = write_yolo(tmp_path / "other", {"train": {"a": BOX}}, [])
    (root / "data.yaml").unlink()
    (root / "classes.txt").write_text("cat\ndog\n")
    source = open_source("yolo", root, strict=True)
    assert (source.class_names, len(source.samples[0].boxes)) == (("cat", "dog"), 1)


def test_quarter_turns_of_exif_scale_boxes_by_the_upright_image(tmp_path):
    root = write_yolo(tmp_path, {"train": {"a": BOX}}, ["cat"])
    write_image(root / "images" / "train" / "a.jpg", orientation=6)
    expected = ("cat", 0.4 * HEIGHT, 0.3 * WIDTH, 0.6 * HEIGHT, 0.7 * WIDTH)
    assert boxes(open_source("yolo", root)) == {"train/a.jpg": [expected]}


@pytest.mark.parametrize(
    ("line", "warning"),
    [
        ("7 0.5 0.5 0.2 0.2", "dropped 1 box of an unknown class, first in {} line 2 ('id 7')"),
        ("0 0.5 0.5 0.2", "dropped 1 box without four finite numbers, first in {} line 2 (0 0.5"),
        ("cat 0.5 0.5 0.2 0.1", "dropped 1 box of an unknown class, first in {} line 2"),
        ("0 0.5 0.5 0 0.1", "dropped 1 box with no area, first in {} line 2"),
        ("0 0.9 0.5 0.6 0.1", "clipped 1 box partly outside the image, first in {} line 2"),
    ],
)
def test_faulty_line_is_counted_and_its_neighbours_stay(tmp_path, line, warning):
    root = write_yolo(tmp_path, {"train": {"a": f"{BOX}\n{line}\n"}}, ["cat"])
    source = open_source("yolo", root)
    assert boxes(source)["train/a.jpg"][0][0] == "cat"
    path = root / "labels" / "train" / "a.txt"
    assert [found.startswith(warning.format(path)) for found in source.warnings] == [True]
    with pytest.raises(DataError, match=r"a\.txt line 2: .*--strict"):
        open_source("yolo", root, strict=True)


def test_boxes_in_pixels_are_named_as_the_likely_cause(tmp_path):
    root = write_yolo(tmp_path, {"train": {"a": "0 20 15 10 10"}}, ["cat"])
    with pytest.raises(DataError, match=r"exceed 1, so they are in pixels, not in fractions"):
        open_source("yolo", root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: images/train\nnames: []", "has no names; add the class names"),
        ("train: images/train\nnames: {a: cat}", "class numbers must be whole"),
        ("train: images/gone\nnames: [cat]", "train names 'images/gone', which does not exist"),
        ("train: 7\nnames: [cat]", "train has 7; expected a folder or file"),
        ("train: [", r"no YOLO layout in '.*': expected data.yaml"),
    ],
)
def test_faulty_description_is_one_line(tmp_path, text, message):
    root = write_yolo(tmp_path, {"train": {"a": BOX}}, ["cat"])
    (root / "data.yaml").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        open_source("yolo", root)
    assert "\n" not in str(caught.value)


def test_a_list_that_names_no_file_is_one_line(tmp_path):
    root = write_yolo(tmp_path, {"train": {"a": BOX}}, ["cat"])
    (root / "list.txt").write_text("images/train/a.jpg\n\n//\n")
    (root / "data.yaml").write_text("train: list.txt\nnames: [cat]")
    with pytest.raises(DataError, match=r"list\.txt' line 3: '//' is not the path of an image"):
        open_source("yolo", root)
