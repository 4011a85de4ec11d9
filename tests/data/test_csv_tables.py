"""Tables of images in CSV and TSV files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from layouts import SIZE, write_image, write_table

from raygkd.data import open_source
from raygkd.errors import ConfigError, DataError

LABELLED = [["image", "label"], ["a.png", "cat"], ["b.png", "dog"], ["c.png", "cat"]]


def labels(source) -> dict[str, tuple[str, str]]:
    """Return file name -> split and class name."""
    return {
        Path(sample.origin).name: (sample.split, source.class_names[sample.label])
        for sample in source.samples
    }


@pytest.mark.parametrize("name", ["labels.csv", "anything.tsv", "train.csv"])
@pytest.mark.parametrize("folder", ["", "pictures"])
def test_images_have_the_labels_of_their_rows(tmp_path, name, folder):
    root = write_table(tmp_path / name, LABELLED, folder)
    expected = {"a.png": ("train", "cat"), "b.png": ("train", "dog"), "c.png": ("train", "cat")}
    assert labels(open_source("csv", root, strict=True)) == expected
    assert labels(open_source("csv", root / name, strict=True)) == expected


def test_columns_have_the_usual_names_in_any_case_and_splits_too(tmp_path):
    rows = [["File_Name", "Class", "Subset"], ["a.png", "10", "Training"], ["b.png", "9", "dev"]]
    source = open_source("csv", write_table(tmp_path / "t.csv", rows))
    assert source.class_names == ("9", "10")
    assert labels(source) == {"a.png": ("train", "10"), "b.png": ("val", "9")}


def test_columns_may_be_chosen(tmp_path):
    rows = [["image", "label", "species"], ["a.png", "x", "cat"]]
    root = write_table(tmp_path / "t.csv", rows)
    assert open_source("csv", root, own={"label": "species"}).class_names == ("cat",)
    with pytest.raises(ConfigError, match=r"csv.label 'kind': not a column of .*image, label, sp"):
        open_source("csv", root, own={"label": "kind"})


def test_images_are_found_by_name_and_without_their_suffix(tmp_path):
    root = write_table(tmp_path / "t.csv", LABELLED, "deep/er")
    text = (root / "t.csv").read_text()
    (root / "t.csv").write_text(text.replace("a.png", "C:\\old\\a.png").replace("b.png", "b"))
    assert len(open_source("csv", root, strict=True).samples) == 3


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_encodings_delimiters_and_quotes_of_spreadsheets(tmp_path, encoding, delimiter):
    write_image(tmp_path / "a b.png")
    text = delimiter.join(["image", "label"]) + "\r\n" + delimiter.join(['"a b.png"', '"Löwe "'])
    (tmp_path / "t.csv").write_bytes(text.encode(encoding))
    assert open_source("csv", tmp_path).class_names == ("Löwe",)


def test_a_table_for_each_split(tmp_path):
    write_table(tmp_path / "train.csv", LABELLED)
    write_table(tmp_path / "valid.csv", [["image", "label"], ["d.png", "cat"]])
    source = open_source("csv", tmp_path, strict=True)
    assert Counter(s.split for s in source.samples) == {"train": 3, "val": 1}


def test_boxes_by_corners_or_by_width_and_height(tmp_path):
    corners = [
        ["filename", "width", "height", "class", "xmin", "ymin", "xmax", "ymax"],
        ["a.png", *SIZE, "cat", 1, 2, 9, 8],
        ["a.png", *SIZE, "dog", 3, 3, 5, 5],
        ["b.png", *SIZE, "", "", "", "", ""],
    ]
    source = open_source("csv", write_table(tmp_path / "one" / "t.csv", corners), strict=True)
    first, second = source.samples
    assert [source.class_names[label] for label in first.boxes.label] == ["cat", "dog"]
    assert first.boxes.xyxy.tolist() == [[1, 2, 9, 8], [3, 3, 5, 5]]
    assert len(second.boxes) == 0
    sides = [["image", "label", "x", "y", "w", "h"], ["a.png", "cat", 1, 2, 8, 6]]
    source = open_source("csv", write_table(tmp_path / "two" / "t.csv", sides), strict=True)
    assert source.samples[0].boxes.xyxy.tolist() == [[1, 2, 9, 8]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["a", "b"], ["a.png", "x"]], "has the columns a, b; expected image and label"),
        ([["image", "label"], ["a.png"]], "line 2: 1 fields, but the header has at least 2"),
        ([["image", "label"], ["a.png", ""]], "line 2: no label; every row needs one"),
        ([["image", "label", "split"], ["a.png", "x", "other"]], "line 2: split 'other' .allowed"),
        ([["image", "label"], ["a.png", "0.5"], ["b.png", "1"]], "such as 0.5 .regression data"),
        (
            [["image", "label"], ["a.png", "cat|dog"], ["b.png", "cat"]],
            "'cat|dog' name several classes .multi-label data.; only one class per image is "
            "supported",
        ),
        (
            [["image", "label"], ["a.png", "cat"], ["a.png", "dog"]],
            "a.png has the labels cat and dog .multi-label data",
        ),
        ([["image", "label"]], "lists no"),
        ([['"a\nb"', "c"], ["a.png", "x"]], "has the columns a b, c; expected image and label"),
    ],
)
def test_faulty_table_is_one_line(tmp_path, rows, message):
    with pytest.raises(DataError, match=message) as caught:
        open_source("csv", write_table(tmp_path / "t.csv", rows))
    assert "\n" not in str(caught.value)


def test_missing_repeated_and_unlisted_images_are_counted(tmp_path):
    root = write_table(tmp_path / "t.csv", [*LABELLED, ["a.png", "cat"]])
    with (root / "t.csv").open("a") as file:
        file.write("gone.png,cat\n")
    write_image(root / "extra.png")
    source = open_source("csv", root)
    assert len(source.samples) == 3
    assert [warning.partition(", first")[0] for warning in source.warnings] == [
        "dropped 1 image listed more than once",
        "dropped 1 image whose file is missing",
        "skipped 1 image not listed in any annotation",
    ]
    with pytest.raises(DataError, match="--strict"):
        open_source("csv", root, strict=True)


def test_folder_without_one_table_is_refused(tmp_path):
    for name in ("one.csv", "two.csv"):
        write_table(tmp_path / name, LABELLED)
    with pytest.raises(DataError, match=r"no table in '.*found one.csv two.csv"):
        open_source("csv", tmp_path)
