"""What VOC's XML and COCO's JSON say, and what becomes of each fault."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layouts import SIZE, write_image, write_xml
from PIL import Image

from raygkd.data import ImageBoxes, decode
from raygkd.data.annotations import Annotation, check_boxes
from raygkd.data.faults import Faults
from raygkd.data.sets.coco import load_coco, read_coco
from raygkd.data.sets.voc import read_voc
from raygkd.errors import DataError

LABELS = {"cat": 0, "dog": 1}
INFINITE = float("inf")


def annotation_of(
    image: Path,
    *boxes: tuple[float, float, float, float],
    names: list[str] | None = None,
    size: tuple[int, int] | None = SIZE,
) -> Annotation:
    count = len(boxes)
    return Annotation(
        place="a.xml",
        image_id="a",
        image=image,
        size=size,
        marks=[f"object {number}" for number in range(1, count + 1)],
        names=names or ["cat"] * count,
        xyxy=np.array(boxes, np.float64).reshape(-1, 4),
        unread={},
        difficult=np.arange(count) == 0,
        crowd=np.arange(count) == 1,
    )


def checked(annotation: Annotation) -> tuple[ImageBoxes, tuple[str, ...]]:
    faults = Faults(strict=False)
    return check_boxes(annotation, LABELS, faults), faults.warnings()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return an image of 40 x 30 pixels."""
    write_image(tmp_path / "a.jpg")
    return tmp_path / "a.jpg"


def test_voc_counts_pixels_from_one_and_includes_the_last(tmp_path: Path) -> None:
    write_xml(tmp_path / "a.xml", "a.jpg", [("cat", 1, 1, 40, 30), ("dog", 11, 6, 11, 6, True)])
    read = read_voc(tmp_path / "a.xml", {"a.jpg": Path("x/a.jpg")}, Path("x"))
    assert read.xyxy.tolist() == [[0, 0, 40, 30], [10, 5, 11, 6]]
    assert (read.names, read.image_id, read.size) == (["cat", "dog"], "a", (40, 30))
    assert read.difficult.tolist() == [False, True]
    assert not read.crowd.any()


@pytest.mark.parametrize(
    ("file_name", "found"),
    [
        ("other.png", "other.png"),
        ("gone.jpg", "a.bmp"),
        ("", "a.bmp"),
        ("C:\\photos\\other.png", "other.png"),
        ("/home/me/other.png", "other.png"),
    ],
)
def test_voc_image_is_the_one_named_else_the_one_of_that_id(
    tmp_path: Path, file_name: str, found: str
) -> None:
    write_xml(tmp_path / "a.xml", file_name, [])
    images = {name: Path(name) for name in ("other.png", "a.bmp")} | {"a": Path("a.bmp")}
    assert read_voc(tmp_path / "a.xml", images, Path("x")).image == Path(found)


def test_voc_annotation_without_objects_has_no_boxes(tmp_path: Path, image: Path) -> None:
    write_xml(tmp_path / "a.xml", "a.jpg", [])
    boxes, warnings = checked(read_voc(tmp_path / "a.xml", {"a.jpg": image}, tmp_path))
    assert (boxes.xyxy.shape, len(boxes), warnings) == ((0, 4), 0, ())
    assert (boxes.xyxy.dtype, boxes.label.dtype) == (np.float32, np.int64)


@pytest.mark.parametrize(
    "text", ["", "<annotation>", "words", "<?xml version='1.0' encoding='klingon'?><a/>"]
)
def test_what_is_no_xml_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(ValueError, match="not XML"):
        read_voc(tmp_path / "a.xml", {}, tmp_path)


@pytest.mark.parametrize(
    ("text", "shown"),
    [("", "'' '1' '5' '5'"), ("nan", "nan 0 5 5"), ("wide", "'wide' '1' '5' '5'")],
)
def test_voc_side_that_is_no_number_drops_the_box_alone(
    tmp_path: Path, image: Path, text: str, shown: str
) -> None:
    write_xml(tmp_path / "a.xml", "a.jpg", [("cat", text, 1, 5, 5), ("dog", 2, 2, 9, 9)])
    boxes, warnings = checked(read_voc(tmp_path / "a.xml", {"a.jpg": image}, tmp_path))
    assert boxes.label.tolist() == [1]
    (warning,) = warnings
    assert f"without four finite numbers, first in {tmp_path}/a.xml object 1 ({shown})" in warning


def test_good_boxes_stay_as_they_are(image: Path) -> None:
    sides = [(0, 0, 40, 30), (0.25, 1.5, 0.75, 2), (39, 29, 40, 30)]
    boxes, warnings = checked(annotation_of(image, *sides, names=["dog", "cat", "dog"]))
    assert boxes.xyxy.tolist() == [list(box) for box in sides]
    assert boxes.label.tolist() == [1, 0, 1]
    assert boxes.difficult.tolist() == [True, False, False]
    assert boxes.crowd.tolist() == [False, True, False]
    assert warnings == ()


@pytest.mark.parametrize(
    ("box", "warning"),
    [
        ((5, 5, 5, 9), "dropped 1 box with no area, first in a.xml object 2 (5 5 5 9)"),
        ((9, 5, 5, 9), "dropped 1 box with no area, first in a.xml object 2 (9 5 5 9)"),
        ((5, 9, 9, 9), "dropped 1 box with no area, first in a.xml object 2 (5 9 9 9)"),
        ((41, 5, 50, 9), "dropped 1 box outside the image, first in a.xml object 2 (41 5 50 9)"),
        (
            (39.5, 5, 50, 9),
            "dropped 1 box outside the image, first in a.xml object 2 (39.5 5 50 9)",
        ),
        (
            (float("nan"), 5, 9, 9),
            "dropped 1 box without four finite numbers, first in a.xml object 2 (nan 5 9 9)",
        ),
        (
            (5, 5, INFINITE, 9),
            "dropped 1 box without four finite numbers, first in a.xml object 2 (5 5 inf 9)",
        ),
        (
            (5, 5, 1e300, 9),
            "dropped 1 box without four finite numbers, first in a.xml object 2 (5 5 1e+300 9)",
        ),
    ],
)
def test_faulty_box_is_dropped_and_its_neighbours_stay(
    image: Path, box: tuple[float, float, float, float], warning: str
) -> None:
    annotation = annotation_of(image, (1, 1, 9, 9), box, (2, 2, 8, 8))
    boxes, warnings = checked(annotation)
    assert boxes.xyxy.tolist() == [[1, 1, 9, 9], [2, 2, 8, 8]]
    assert (boxes.difficult.tolist(), boxes.crowd.tolist()) == ([True, False], [False, False])
    assert warnings == (warning,)
    with pytest.raises(DataError, match=r"^a\.xml object 2: box .*--strict") as caught:
        check_boxes(annotation, LABELS, Faults(strict=True))
    assert "\n" not in str(caught.value)


def test_box_beyond_the_image_is_clipped_to_it(image: Path) -> None:
    annotation = annotation_of(image, (-3, 5, 9, 9), (30, 20, 41, 99), (39, 5, 41, 9))
    boxes, warnings = checked(annotation)
    assert boxes.xyxy.tolist() == [[0, 5, 9, 9], [30, 20, 40, 30], [39, 5, 40, 9]]
    assert warnings == (
        "clipped 3 boxes partly outside the image, first in a.xml object 1 (-3 5 9 9)",
    )
    with pytest.raises(
        DataError, match=r"a\.xml object 1: box partly outside the image \(-3 5 9 9\)"
    ):
        check_boxes(annotation, LABELS, Faults(strict=True))


def test_rounding_beyond_the_edge_is_no_fault(image: Path) -> None:
    boxes, warnings = checked(annotation_of(image, (20.1, 10, 20.1 + 19.9 + 1e-14, 30 + 1e-9)))
    assert boxes.xyxy[:, 2:].tolist() == [[40, 30]]
    assert warnings == ()


SIDE = st.floats(width=64) | st.floats(-2, 42) | st.sampled_from([0.0, 30.0, 40.0, 40.0001])


@given(st.lists(st.tuples(SIDE, SIDE, SIDE, SIDE), max_size=4))
def test_boxes_that_remain_are_finite_with_area_and_inside_whatever_is_written(
    tmp_path_factory: pytest.TempPathFactory, sides: list[tuple[float, float, float, float]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "hypothesis.jpg"
    if not path.exists():
        write_image(path)
    boxes, warnings = checked(annotation_of(path, *sides))
    assert np.isfinite(boxes.xyxy).all()
    assert (boxes.xyxy[:, 2:] > boxes.xyxy[:, :2]).all()
    assert (boxes.xyxy >= 0).all()
    assert (boxes.xyxy <= [40, 30, 40, 30]).all()
    assert len(boxes) == len(sides) or warnings


def test_unknown_class_is_dropped_by_name(image: Path) -> None:
    annotation = annotation_of(image, (1, 1, 9, 9), (2, 2, 8, 8), names=["cta", "dog"])
    boxes, warnings = checked(annotation)
    assert boxes.label.tolist() == [1]
    assert warnings == ("dropped 1 box of an unknown class, first in a.xml object 1 ('cta')",)
    with pytest.raises(DataError, match="object 1: box of an unknown class \\('cta'\\)"):
        check_boxes(annotation, LABELS, Faults(strict=True))


def test_warnings_count_each_kind_and_tell_where_it_is_first(image: Path) -> None:
    faults = Faults(strict=False)
    for box in ((5, 5, 5, 5), (50, 5, 60, 9), (6, 6, 6, 6)):
        check_boxes(annotation_of(image, box), LABELS, faults)
    assert faults.warnings() == (
        "dropped 2 boxes with no area, first in a.xml object 1 (5 5 5 5)",
        "dropped 1 box outside the image, first in a.xml object 1 (50 5 60 9)",
    )


def test_size_of_the_file_counts_and_a_wrong_one_is_told(image: Path) -> None:
    annotation = annotation_of(image, (10, 10, 60, 25), size=(80, 60))
    boxes, warnings = checked(annotation)
    assert boxes.xyxy.tolist() == [[10, 10, 40, 25]]
    assert warnings[0] == (
        "ignored 1 image size different from the file's, first in a.xml (80x60, the file has 40x30)"
    )
    with pytest.raises(
        DataError, match=r"^a\.xml: image size different from the file's \(80x60, the"
    ):
        check_boxes(annotation, LABELS, Faults(strict=True))


def test_size_that_is_not_written_is_no_fault(image: Path) -> None:
    assert checked(annotation_of(image, (1, 1, 9, 9), size=None))[1] == ()


def test_broken_image_has_the_written_size(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("words")
    boxes, _ = checked(annotation_of(tmp_path / "a.jpg", (1, 1, 99, 9)))
    assert boxes.xyxy.tolist() == [[1, 1, 40, 9]]


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_where_the_decoded_image_has_the_object(
    tmp_path: Path, suffix: str, orientation: int
) -> None:
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[8:16, 16:40] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    options = {"quality": 95} if suffix == "jpg" else {}
    Image.fromarray(pixels).save(path, exif=exif, **options)
    image_CHW = decode(path.read_bytes())
    upright = image_CHW.shape[2], image_CHW.shape[1]
    assert upright == ((32, 48) if orientation >= 5 else (48, 32))
    y, x = np.nonzero(image_CHW[0].numpy() > 128)
    seen = [x.min(), y.min(), x.max() + 1, y.max() + 1]
    boxes, warnings = checked(annotation_of(path, tuple(seen), size=upright))
    assert (boxes.xyxy.tolist(), warnings) == ([seen], ())
    # a box of the stored image is turned with it
    if orientation >= 5 and suffix != "tiff":
        boxes, warnings = checked(annotation_of(path, (16, 8, 40, 16), size=(48, 32)))
        assert (boxes.xyxy.tolist(), warnings) == ([seen], ())


COCO = {
    "images": [
        {"id": 7, "file_name": "b.jpg", "width": 40, "height": 30},
        {"id": 3, "file_name": "a.jpg"},
    ],
    "annotations": [
        {"id": 50, "image_id": 3, "category_id": 9, "bbox": [1, 2, 3.5, 4], "iscrowd": 1},
        {"id": 51, "image_id": 3, "category_id": 2, "bbox": [0, 0, 5, 6]},
    ],
    "categories": [{"id": 9, "name": "dog"}, {"id": 2, "name": "cat"}],
}


def read(contents: object, folder: Path, *, strict: bool = False) -> tuple:
    path = folder / "c.json"
    path.write_text(contents if isinstance(contents, str) else json.dumps(contents))
    faults = Faults(strict)
    return *read_coco(load_coco(path), path, folder, faults), faults.warnings()


def test_coco_boxes_have_width_and_height(tmp_path: Path) -> None:
    names, (empty, full), warnings = read(COCO, tmp_path)
    assert names == ["cat", "dog"]
    assert (empty.image, empty.xyxy.shape, empty.size) == (tmp_path / "b.jpg", (0, 4), (40, 30))
    assert full.xyxy.tolist() == [[1, 2, 4.5, 6], [0, 0, 5, 6]]
    assert (full.names, full.crowd.tolist()) == (["dog", "cat"], [True, False])
    assert (full.image_id, full.size, full.place) == ("3", None, f"{tmp_path}/c.json image 3")
    assert warnings == ()


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (
            {"annotations": [{"id": 5, "image_id": 4, "category_id": 2, "bbox": [0, 0, 1, 1]}]},
            "dropped 1 box of an unknown image, first in {}/c.json annotation 5 (image 4)",
        ),
        (
            {"annotations": [{"image_id": 3, "category_id": 4, "bbox": [0, 0, 1, 1]}]},
            "dropped 1 box of an unknown class, first in {}/c.json an annotation without id "
            "(category 4)",
        ),
        (
            {"images": [*COCO["images"], {"id": 3, "file_name": "c.jpg"}]},
            "dropped 1 image listed more than once, first in {}/c.json image 3 (c.jpg)",
        ),
    ],
)
def test_coco_entries_that_refer_to_nothing_are_dropped(
    tmp_path: Path, change: dict, warning: str
) -> None:
    _, annotations, warnings = read(COCO | change, tmp_path)
    assert [annotation.image.name for annotation in annotations] == ["b.jpg", "a.jpg"]
    assert warnings == (warning.format(tmp_path),)
    with pytest.raises(DataError, match=r"c\.json .*--strict"):
        read(COCO | change, tmp_path, strict=True)


@pytest.mark.parametrize(
    "bbox", [[1, 2, 3], [1, 2, None, 4], [1, 2, "x", 4], [1, 2, float("nan"), 4]]
)
def test_coco_box_without_four_numbers_is_dropped(tmp_path: Path, image: Path, bbox: list) -> None:
    box = {"id": 5, "image_id": 3, "category_id": 2, "bbox": bbox}
    _, annotations, _ = read(COCO | {"annotations": [box]}, tmp_path)
    boxes, warnings = checked(annotations[1])
    assert len(boxes) == 0
    assert warnings[0].startswith("dropped 1 box without four finite numbers, first in")


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("{", "'.*c.json' is not JSON"),
        ("", "'.*c.json' is not JSON"),
        ("[]", "'.*c.json' has no list 'images'"),
        ({"images": []}, "'.*c.json' has no list 'annotations'"),
        (COCO | {"categories": {}}, "'.*c.json' has no list 'categories'"),
        (COCO | {"images": [{"id": 1}]}, r"'.*c.json': images\[0\] has no 'file_name' \(a string"),
        (
            COCO | {"annotations": [{"image_id": 3, "category_id": 2}]},
            r"annotations\[0\] has no 'b",
        ),
        (
            COCO | {"categories": [{"id": ["2"], "name": "cat"}]},
            r"categories\[0\] has no 'id' \(a number or string",
        ),
        (COCO | {"images": [7]}, r"images\[0\] has no 'id'"),
    ],
)
def test_what_is_no_instances_file_is_one_line(
    tmp_path: Path, contents: object, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(contents, tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'.*gone\.json' cannot be read: No such file"):
        load_coco(tmp_path / "gone.json")
