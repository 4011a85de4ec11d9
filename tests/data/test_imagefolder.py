"""Trees of class folders as they come: other names of splits, other files, other levels."""

from __future__ import annotations

from collections import Counter

import pytest
from PIL import features

from raygkd.data import decode, open_source
from raygkd.errors import DataError


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [("training", "validation", "testing"), ("Train", "Valid", "Test"), ("train", "eval", "test"),
     ("train", "dev", "test")],
)  # fmt: skip
def test_split_folders_have_the_usual_names_in_any_case(make_tree, train, val, test):
    root = make_tree({f"{train}/a": 2, f"{train}/b": 1, f"{val}/a": 1, f"{test}/b": 3})
    source = open_source("imagefolder", root, strict=True)
    assert source.class_names == ("a", "b")
    assert Counter(s.split for s in source.samples) == {"train": 3, "val": 1, "test": 3}


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ({"val/a": 1, "test/a": 1}, "has the splits test and val but no folder for training"),
        ({"a/train": 1, "a/val": 1, "b/train": 1}, "has the splits train and val below .*folder a"),
        ({"set/train/a": 1, "set/val/a": 1}, "below its folder set; set --data-dir to '.*/set'"),
        ({"photos/a": 1, "photos/b": 1}, "single class folder, whose folders a, b may be the cl"),
    ],
)
def test_classes_on_another_level_are_refused(make_tree, folders, message):
    with pytest.raises(DataError, match=message) as caught:
        open_source("imagefolder", make_tree(folders))
    assert "\n" not in str(caught.value)


def test_what_is_left_out_or_doubtful_is_counted_and_refused_in_strict_mode(make_tree):
    root = make_tree({"train/a": 2, "train/A ": 1, "train/test": 1, "extra": 1})
    for name in ("notes.txt", "b.RAW", "c.raw", "Thumbs.db"):
        (root / "train" / "a" / name).write_text("")
    source = open_source("imagefolder", root)
    assert [warning.partition(", first")[0] for warning in source.warnings] == [
        "skipped 1 folder next to the splits",
        "skipped 2 files with the suffix .raw",
        "skipped 1 file with the suffix .txt",
        "found 1 class whose name differs from another's only by case or spaces",
        "found 1 class with the name of a split",
    ]
    with pytest.raises(DataError, match=r"extra: folder next to the splits.*omit --strict to ha"):
        open_source("imagefolder", root, strict=True)


@pytest.mark.parametrize(("kind", "suffix"), [("AVIF", "avif"), ("JPEG2000", "jp2")])
def test_newer_formats_are_images(make_tree, encode_image, kind, suffix):
    feature = {"AVIF": "avif", "JPEG2000": "jpg_2000"}[kind]
    if not features.check(feature):
        pytest.skip(f"Pillow without {feature}")
    root = make_tree({"a": 1})
    (root / "a" / f"photo.{suffix}").write_bytes(encode_image(kind=kind))
    source = open_source("imagefolder", root, strict=True)
    assert [decode(sample.read()).shape for sample in source.samples] == [(3, 12, 12)] * 2
