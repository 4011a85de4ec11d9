"""Pascal VOC's layout as other programs write it: encodings, lists and folders."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from layouts import write_image, write_voc, write_xml

from raygkd.data import open_source
from raygkd.errors import DataError

CAT = ("cat", 1, 1, 9, 9)


@pytest.mark.parametrize(
    ("declared", "encoding", "name"),
    [
        ("gbk", "gbk", "猫"),
        ("GB2312", "gbk", "镕"),
        ("gb18030", "gb18030", "𠮷"),
        ("big5", "big5", "貓"),
        ("Shift_JIS", "cp932", "猫①"),
        ("EUC-JP", "euc-jp", "猫"),
        ("euc-kr", "cp949", "고양이"),
        ("utf-16", "utf-16", "猫"),
        ("UTF-16", "utf-16-le", "猫"),
        ("UTF-16", "utf-16-be", "猫"),
        ("utf-16", "utf-8", "猫"),
        ("utf-32", "utf-32", "猫"),
        ("UTF-8", "utf-8-sig", "猫"),
        ("iso-8859-15", "iso-8859-15", "Œuf"),
        ("windows-1251", "cp1251", "кошка"),
        ("koi8-r", "koi8-r", "кошка"),
    ],
)
def test_class_names_are_read_in_the_declared_encoding(tmp_path, declared, encoding, name):
    root = write_voc(tmp_path, {"a": []})
    path = root / "Annotations" / "a.xml"
    write_xml(path, "a.jpg", [(name, 1, 1, 9, 9)])
    text = f"<?xml version='1.0' encoding='{declared}'?>\n{path.read_text(encoding='utf-8')}"
    path.write_bytes(text.encode(encoding))
    source = open_source("voc", root, strict=True)
    assert (source.class_names, len(source.samples[0].boxes)) == ((name,), 1)


def test_text_that_is_not_in_its_encoding_is_a_fault(tmp_path):
    root = write_voc(tmp_path, {"a": [CAT], "b": [CAT]})
    (root / "Annotations" / "b.xml").write_bytes("<annotation>狗</annotation>".encode("gbk"))
    (warning,) = open_source("voc", root).warnings
    assert "without a readable annotation" in warning
    assert "'utf-8' codec can't decode" in warning


@pytest.mark.parametrize(
    "lines",
    [
        "a 1\nb -1\n",
        "a.jpg\nb.xml\n",
        "# made by hand\na  # first\n\nb\n",
        "JPEGImages/a.jpg\nC:\\old\\JPEGImages\\b.jpg\n",
        "a,cat\nb,dog\n",
    ],
)
def test_lists_may_have_columns_suffixes_paths_and_comments(tmp_path, lines):
    root = write_voc(tmp_path, {"a": [CAT], "b": [CAT], "c": [CAT]}, {"train": "x"})
    (root / "ImageSets" / "Main" / "train.txt").write_text(lines)
    source = open_source("voc", root, strict=True)
    assert [sample.image_id for sample in source.samples] == ["a", "b"]


def test_ids_with_spaces_dots_and_number_signs_are_found_as_they_are(tmp_path):
    ids = ["photo 1", "v1.2", "a#b"]
    root = write_voc(tmp_path, {image_id: [CAT] for image_id in ids}, {"train": ids})
    source = open_source("voc", root, strict=True)
    assert [sample.image_id for sample in source.samples] == ids


@pytest.mark.parametrize(
    "folders", [("annotations", "images"), ("Annotations", "Images"), ("", "")]
)
def test_folders_of_other_names_and_files_side_by_side(tmp_path, folders):
    for name in "ab":
        write_xml(tmp_path / folders[0] / f"{name}.xml", f"{name}.jpg", [CAT])
        write_image(tmp_path / folders[1] / f"{name}.jpg")
    source = open_source("voc", tmp_path, strict=True)
    assert [sample.image_id for sample in source.samples] == ["a", "b"]


def test_split_folders_with_files_side_by_side(tmp_path):
    for split in ("train", "valid", "test"):
        write_xml(tmp_path / split / f"{split}.xml", f"{split}.jpg", [CAT])
        write_image(tmp_path / split / f"{split}.jpg")
    source = open_source("voc", tmp_path, strict=True)
    assert Counter(s.split for s in source.samples) == {"train": 1, "val": 1, "test": 1}


@pytest.mark.parametrize(
    ("box", "cause"),
    [
        ((1.1, 1.2, 0.9, 0.8), "nearly all boxes lie in 0..1, so they are in fractions"),
        ((20, 20, 70, 60), "nearly all boxes extend beyond their images"),
    ],
)
def test_likely_cause_of_boxes_in_another_unit_is_named(tmp_path, box, cause):
    root = write_voc(tmp_path, {"a": [("cat", *box)], "b": [("cat", *box)]})
    with_warnings = ""
    try:
        with_warnings = " ".join(open_source("voc", root).warnings)
    except DataError as error:
        with_warnings = str(error)
    assert cause in with_warnings
    assert f"{root}/Annotations/a.xml" in with_warnings


def test_images_without_any_annotation_are_no_voc_layout(tmp_path):
    write_image(tmp_path / "a.jpg")
    Path(tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match="no VOC layout"):
        open_source("voc", tmp_path)
