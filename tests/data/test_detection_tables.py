"""Boxes in Parquet: written, opened, refused, described."""

from __future__ import annotations

import dataclasses
import json
import pickle
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from layouts import write_voc
from PIL import Image

from raygkd.data import ImageBoxes, Sample, Source, open_source, sample_sheet, table_info
from raygkd.data.parquet import open_table
from raygkd.data.prepare import prepare
from raygkd.errors import DataError

SIZES = ((12, 12), (40, 20), (9, 30))


def random_boxes(rng: np.random.Generator, count: int, size: tuple[int, int]) -> ImageBoxes:
    corner = rng.uniform(0, 4, (count, 2))
    sides = np.concatenate([corner, corner + rng.uniform(0.5, min(size) - 4, (count, 2))], axis=1)
    return ImageBoxes(
        xyxy=sides.astype(np.float32),
        label=rng.integers(0, 3, count),
        difficult=rng.random(count) < 0.3,
        crowd=rng.random(count) < 0.3,
    )


@pytest.fixture
def make_detection_source(encode_image):
    """Return a function that makes images of several sizes with 0, 1, 2... boxes."""

    def make(images: int, *, most: int = 6) -> Source:
        rng = np.random.default_rng(0)
        samples = [
            Sample(
                0,
                ("train", "val", "test")[index % 3],
                f"image {index}",
                partial(encode_image, index, SIZES[index % 3]),
                random_boxes(rng, index % (most + 1), SIZES[index % 3]),
                f"id-{index}",
            )
            for index in range(images)
        ]
        return Source("toy", ("ant", "bee", "cat"), samples)

    return make


def assert_equal(boxes: ImageBoxes, others: ImageBoxes) -> None:
    for field in dataclasses.fields(ImageBoxes):
        one, other = getattr(boxes, field.name), getattr(others, field.name)
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert (one == other).all()


@pytest.mark.parametrize("shard_bytes", [1, 1 << 20])
def test_prepared_boxes_are_equal_to_the_source(tmp_path, make_detection_source, shard_bytes):
    source = make_detection_source(700)
    summary = prepare(source, str(tmp_path / "out"), shard_bytes=shard_bytes)
    table = open_table(str(tmp_path / "out"))
    assert (table.task, len(table), len(table.boxes)) == ("detection", 700, 700)
    assert len(table.files) == (1 if shard_bytes > 1 else 3)
    expected = {sample.read(): sample for sample in source.samples}
    for row, image in enumerate(table.read(np.arange(700))):
        assert_equal(table.boxes[row], expected[image].boxes)
        assert table.where(row).endswith(f"({expected[image].origin})")
    assert not table.labels.any()
    assert table.labels.dtype == np.int64
    assert table.boxes.most == 6
    boxes = sum(len(sample.boxes) for sample in source.samples)
    assert (summary["boxes"], summary["images"], summary["warnings"]) == (boxes, 700, [])


def test_image_ids_and_the_task_are_written(tmp_path, make_detection_source):
    prepare(make_detection_source(4), str(tmp_path / "out"))
    written = pq.read_table(tmp_path / "out" / "part-00000.parquet")
    pairs = zip(written["origin"].to_pylist(), written["image_id"].to_pylist())
    assert sorted(pairs) == [(f"image {index}", f"id-{index}") for index in range(4)]
    facts = json.loads(written.schema.metadata[b"raygkd"])
    facts.pop("warnings", None)
    assert facts == {
        "version": 1,
        "dataset": "toy",
        "classes": ["ant", "bee", "cat"],
        "task": "detection",
    }


def test_images_without_any_box_can_be_written(tmp_path, make_detection_source):
    prepare(make_detection_source(5, most=0), str(tmp_path / "out"))
    table = open_table(str(tmp_path / "out"))
    assert (table.task, table.boxes.most, table.class_names[2]) == ("detection", 0, "cat")
    assert table.boxes[3].xyxy.shape == (0, 4)
    assert table_info(table)["boxes_per_image"] == {"min": 0, "median": 0, "max": 0}
    sample_sheet(table, str(tmp_path / "sheet.png"))


def test_detection_table_survives_pickling(tmp_path, make_detection_source):
    prepare(make_detection_source(20), str(tmp_path / "out"))
    table = open_table(str(tmp_path / "out"))
    twin = pickle.loads(pickle.dumps(table))
    assert_equal(twin.boxes[5], table.boxes[5])
    assert twin.fingerprint() == table.fingerprint()


def test_classification_has_no_trace_of_boxes(tmp_path, make_source):
    summary = prepare(make_source(6), str(tmp_path / "out"))
    table = open_table(str(tmp_path / "out"))
    assert (table.task, table.boxes) == ("classification", None)
    assert "boxes" not in summary
    assert not table_info(table).keys() & {"boxes", "task"}
    facts = json.loads(pq.read_schema(tmp_path / "out" / "part-00000.parquet").metadata[b"raygkd"])
    assert facts == {"version": 1, "dataset": "toy", "classes": ["ant", "bee", "cat"]}


def test_warnings_of_the_source_are_returned_and_kept(tmp_path):
    flat = ("cat", 3, 3, 2, 9)
    root = write_voc(tmp_path / "voc", {"a": [flat, ("cat", 1, 1, 9, 9)], "b": [flat]})
    summary = prepare(open_source("voc", root), str(tmp_path / "out"))
    expected = f"dropped 2 boxes with no area, first in {root}/Annotations/a.xml object 1 (2 2 2 9)"
    small = "found 1 class with a single image, first in voc ('cat')"
    images = f"{root}/JPEGImages"
    copy = (
        "found 1 image with a copy that may land in another split (val and test cut from train), "
        f"first in {images}/b.jpg ({images}/a.jpg)"
    )
    assert summary["warnings"] == [expected, small, copy]
    assert open_table(str(tmp_path / "out")).warnings == (expected, small, copy)
    assert (summary["boxes"], summary["images"]) == (1, 2)


@pytest.fixture
def write(tmp_path):
    """Write columns to a Parquet file and return its path."""

    def write_columns(columns, *, metadata=None, name="foreign.parquet"):
        table = pa.table(columns).replace_schema_metadata(metadata)
        pq.write_table(table, tmp_path / name)
        return str(tmp_path / name)

    return write_columns


@pytest.mark.parametrize(
    "boxes",
    [
        pa.list_(pa.list_(pa.float32())),
        pa.list_(pa.list_(pa.int64())),
        pa.large_list(pa.large_list(pa.float64())),
        pa.list_(pa.list_(pa.float32(), 4)),
    ],
)
def test_foreign_file_needs_image_boxes_and_labels_only(write, encode_image, boxes):
    sides = [[[0, 1, 5, 6], [2, 2, 3, 4]], [], [[1, 1, 9, 9]]]
    columns = {
        "image": [encode_image(seed) for seed in range(3)],
        "boxes": pa.array(sides, boxes),
        "labels": pa.array([[2, 0], [], [1]], pa.list_(pa.int8())),
    }
    table = open_table(write(columns))
    assert (table.task, table.class_names) == ("detection", ("class-0", "class-1", "class-2"))
    assert [table.boxes[row].xyxy.tolist() for row in range(3)] == sides
    assert [table.boxes[row].label.tolist() for row in range(3)] == [[2, 0], [], [1]]
    assert not table.boxes.every.difficult.any()
    assert not table.boxes.every.crowd.any()
    flags = {"difficult": [[True, False], [], [True]], "crowd": [[False, True], [], [False]]}
    table = open_table(write(columns | flags, metadata={"classes": "a,b,c,d"}))
    assert table.boxes.every.difficult.tolist() == [True, False, True]
    assert table.boxes.every.crowd.tolist() == [False, True, False]
    assert table.class_names == ("a", "b", "c", "d")


BOX = [0.0, 0.0, 2.0, 2.0]
GOOD = {"image": [b"x"] * 3, "boxes": [[BOX], [], [BOX, BOX]], "labels": [[0], [], [1, 0]]}
NAN = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [[0], [1], [1, 0]]}, "row 1: 0 boxes but 1 labels; every box needs one"),
        ({"crowd": [[True], [], [True]]}, "row 2: 2 boxes but 1 crowd; every box needs one"),
        ({"boxes": [[BOX], None, [BOX, BOX]]}, "row 1: no list of boxes; use an empty list"),
        ({"labels": [None, [], [1, 0]]}, "row 0: no list of labels"),
        (
            {"boxes": [[BOX], [], [BOX, BOX[:3]]]},
            r"row 2 box 1: \[0.0, 0.0, 2.0\] must be four numbers",
        ),
        ({"boxes": [[BOX], [], [None, BOX]]}, "row 2 box 0: None must be four numbers"),
        ({"boxes": [[[0, 0, 2, NAN]], [], [BOX, BOX]]}, r"row 0 box 0: .*nan\] must have fin"),
        ({"boxes": [[[0, 0, 2, None]], [], [BOX, BOX]]}, "row 0 box 0: .* must have finite sides"),
        ({"boxes": [[BOX], [], [BOX, [2.0, 0, 2, 5]]]}, "row 2 box 1: .*has no area"),
        ({"boxes": [[BOX], [], [BOX, [0.0, 5, 2, 4]]]}, "row 2 box 1: .*has no area"),
        ({"labels": [[0], [], [-1, 0]]}, r"row 2 box 0: label -1 \(allowed: 0 to 99999"),
        ({"labels": [[0], [], [1, None]]}, r"row 2 box 1: label None \(allowed: 0 to 99999"),
        (
            {"difficult": [[True], [], [True, None]]},
            "row 2 box 1: difficult None must be true or false",
        ),
        ({"boxes": [0, 1, 2]}, r"boxes \(int64\).*; expected image .*boxes \(lists of lists"),
        ({"labels": [["a"], [], ["b", "c"]]}, r"; expected image .*labels \(lists of integers\)"),
        ({"difficult": [[0], [], [0, 1]]}, r"; expected image .*difficult and crowd \(lists of b"),
    ],
)
def test_wrong_boxes_are_one_line_that_names_file_and_row(write, change, message):
    with pytest.raises(DataError, match=message) as caught:
        open_table(write(GOOD | change))
    assert "foreign.parquet" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_boxes_without_labels_are_refused(write):
    columns = {"image": GOOD["image"], "boxes": GOOD["boxes"]}
    with pytest.raises(DataError, match=r"expected image .* labels \(lists of integers\)"):
        open_table(write(columns))


def test_box_label_beyond_the_named_classes_tells_the_range(write):
    with pytest.raises(DataError, match=r"row 2 box 0: label 1 \(allowed: 0 to 0, the named"):
        open_table(write(GOOD, metadata={"classes": "a"}))


def test_label_beside_boxes_is_for_classification(write):
    table = open_table(write(GOOD | {"label": [2, 0, 1]}))
    assert (table.task, table.labels.tolist()) == ("classification", [2, 0, 1])


def test_files_with_and_without_boxes_are_not_mixed(tmp_path, write):
    write(GOOD, name="a.parquet")
    write({"image": [b"x"], "label": [0]}, name="b.parquet")
    with pytest.raises(DataError, match=r"'.*a.parquet' has boxes and '.*b.parquet' has labels"):
        open_table(str(tmp_path))


def test_fingerprint_sees_every_change_of_a_box(write):
    columns = {
        "image": [b"x", b"y", b"z"],
        "boxes": [[BOX, BOX], [], [BOX]],
        "labels": [[0, 1], [], [1]],
        "difficult": [[False, True], [], [False]],
        "crowd": [[False, False], [], [True]],
    }
    moved_to_another_image = {
        name: [values[0][:1], values[0][1:], values[2]]
        for name, values in columns.items()
        if name != "image"
    }
    changes = [
        {},
        {"boxes": [[BOX, [0.0, 0.0, 2.0, 2.25]], [], [BOX]]},
        {"labels": [[0, 1], [], [0]]},
        {"difficult": [[True, True], [], [False]]},
        {"crowd": [[False, False], [], [False]]},
        moved_to_another_image,
    ]
    prints = [
        open_table(write(columns | change, metadata={"classes": "a,b"})).fingerprint()
        for change in changes
    ]
    assert len(set(prints)) == len(changes)
    assert open_table(write(columns, metadata={"classes": "a,b"})).fingerprint() == prints[0]


def test_info_counts_images_and_boxes_of_each_class(write, encode_image):
    columns = {
        "image": [encode_image(seed) for seed in range(3)],
        "boxes": [[BOX, BOX, BOX], [], [BOX]],
        "labels": [[0, 0, 2], [], [0]],
        "difficult": [[True, False, False], [], [True]],
        "crowd": [[False, False, True], [], [False]],
        "split": ["train", "test", "train"],
    }
    info = table_info(open_table(write(columns, metadata={"classes": "a,b,c"})))
    assert info["classes"] == {
        "a": {"images": 2, "boxes": 3, "difficult": 2, "crowd": 0},
        "b": {"images": 0, "boxes": 0, "difficult": 0, "crowd": 0},
        "c": {"images": 1, "boxes": 1, "difficult": 0, "crowd": 1},
    }
    assert (info["task"], info["boxes"], info["difficult"], info["crowd"]) == ("detection", 4, 2, 1)
    assert info["boxes_per_image"] == {"min": 0, "median": 1, "max": 3}
    assert info["splits"] == {"train": 2, "val": 0, "test": 1}
    assert json.loads(json.dumps(info)) == info


def test_sheet_shows_boxes_around_the_objects(tmp_path, write):
    pixels = np.zeros((40, 80, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "black.png")
    image = (tmp_path / "black.png").read_bytes()
    columns = {"image": [image], "boxes": [[[20.0, 10.0, 60.0, 30.0]]], "labels": [[0]]}
    sample_sheet(open_table(write(columns, metadata={"classes": "cat"})), str(tmp_path / "s.png"))
    sheet = np.asarray(Image.open(tmp_path / "s.png"))
    # the image is enlarged twice, in the first tile of the sheet
    tile = sheet[48 : 48 + 160, 16 : 16 + 160].astype(int)
    assert tile.shape == (160, 160, 3)
    drawn = np.ptp(tile, axis=2) > 100
    assert drawn[20, 40:120].all()
    assert drawn[59, 40:120].all()
    assert drawn[20:60, 40].all()
    assert drawn[20:60, 119].all()
    assert not drawn[21:59, 41:119].any()
    # the name stands above the box
    assert drawn[10:20, 41:50].any()
    assert (tile[80:] == 255).all()


def test_sheet_has_rows_of_images_and_leaves_broken_ones_out(tmp_path, write, encode_image):
    images = [encode_image(seed, (30, 30)) for seed in range(12)]
    images[3] = b"broken"
    columns = {"image": images, "boxes": [[BOX]] * 12, "labels": [[0]] * 12}
    table = open_table(write(columns))
    sample_sheet(table, str(tmp_path / "s.png"), columns=4)
    sheet = np.asarray(Image.open(tmp_path / "s.png"))
    assert sheet.shape == (48 + 3 * 164 - 4 + 16, 2 * 16 + 4 * 164 - 4, 3)
    tiles = [
        sheet[top : top + 160, left : left + 160]
        for top in (48, 212, 376)
        for left in (16, 180, 344, 508)
    ]
    assert [bool((tile != 255).any()) for tile in tiles] == [True] * 11 + [False]
