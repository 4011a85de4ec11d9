"""What the scenes of digits promise."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

from raygkd.data.scenes import make_scenes, write_scenes
from raygkd.data.sklearn_digits import load_digits
from raygkd.errors import DataError


@pytest.fixture(scope="module")
def scenes():
    return list(make_scenes("train", 300))


def test_sizes_and_numbers_are_within_their_bounds_and_reach_them(scenes):
    sides = np.array([(scene.height, scene.width) for scene in scenes])
    assert sides.min() >= 96
    assert sides.max() <= 160
    assert np.ptp(sides) > 60
    assert {len(scene.placed) for scene in scenes} == set(range(1, 9))
    assert {one.label for scene in scenes for one in scene.placed} == set(range(10))
    longest = [max(one.ink_HW.shape) for scene in scenes for one in scene.placed]
    assert max(longest) <= 48
    assert min(longest) < 14
    assert max(longest) > 44


def test_boxes_are_inside_and_no_two_overlap_by_more_than_the_promised_iou(scenes):
    highest = 0.0
    for scene in scenes:
        xyxy = torch.from_numpy(scene.boxes.xyxy)
        assert (xyxy >= 0).all()
        assert (xyxy[:, 2] <= scene.width).all()
        assert (xyxy[:, 3] <= scene.height).all()
        highest = max(highest, float(box_iou(xyxy, xyxy).fill_diagonal_(0).max()))
    assert 0.2 < highest <= 0.3


def test_boxes_are_tight_around_the_ink(scenes):
    for scene in scenes[:50]:
        assert len(scene.boxes) == len(scene.placed)
        for one, box in zip(scene.placed, scene.boxes.xyxy.astype(int).tolist()):
            ink_HW = np.zeros((scene.height, scene.width))
            height, width = one.ink_HW.shape
            ink_HW[one.top : one.top + height, one.left : one.left + width] = one.ink_HW
            y, x = np.nonzero(ink_HW)
            assert box == [x.min(), y.min(), x.max() + 1, y.max() + 1]
            assert ink_HW[y, x].min() >= 0.2


def test_ink_is_painted_where_the_boxes_are(scenes):
    alone = [scene for scene in scenes if len(scene.placed) == 1]
    assert len(alone) > 20
    for scene in alone:
        pixels_HW = scene.paint().astype(float)
        assert pixels_HW.shape == (scene.height, scene.width)
        x0, y0, x1, y1 = scene.placed[0].xyxy
        inside_HW = pixels_HW[y0:y1, x0:x1]
        # the brightness of the pixels follows the ink of the digit
        assert np.corrcoef(inside_HW.ravel(), scene.placed[0].ink_HW.ravel())[0, 1] > 0.7


def test_labels_are_those_of_the_original_digits(scenes):
    digits = load_digits()
    for scene in scenes:
        numbers = [one.digit for one in scene.placed]
        assert scene.boxes.label.tolist() == digits.label[numbers].tolist()


def test_splits_have_no_digit_in_common():
    used = {
        split: {one.digit for scene in make_scenes(split, 300) for one in scene.placed}
        for split in ("train", "val", "test")
    }
    is_test = load_digits().is_test
    assert is_test[list(used["test"])].all()
    assert not is_test[list(used["train"] | used["val"])].any()
    assert not used["train"] & used["val"]


def test_scenes_depend_on_seed_split_and_place_alone():
    def content(scene):
        return scene.paint().tobytes(), scene.boxes.xyxy.tobytes(), scene.boxes.label.tobytes()

    few = [content(scene) for scene in make_scenes("train", 3)]
    sizes = [(scene.height, scene.width) for scene in make_scenes("train", 3)]
    assert few == [content(scene) for scene in make_scenes("train", 5)][:3]
    assert len(set(few)) == 3
    for split, seed in (("val", 0), ("train", 1)):
        others = list(make_scenes(split, 3, seed=seed))
        assert few[0] != content(others[0])
        assert [(s.height, s.width) for s in others] != sizes


def test_folder_has_the_layout_of_voc(tmp_path):
    write_scenes(tmp_path / "out", images={"train": 3, "test": 2}, seed=4)
    out = tmp_path / "out"
    lists = {path.stem: path.read_text().split() for path in out.glob("ImageSets/Main/*.txt")}
    assert lists == {
        "train": ["train_00000", "train_00001", "train_00002"],
        "test": ["test_00000", "test_00001"],
    }
    scene = list(make_scenes("train", 2, seed=4))[1]
    root = ElementTree.parse(out / "Annotations" / "train_00001.xml").getroot()
    image = Image.open(out / "JPEGImages" / root.findtext("filename"))
    assert (np.asarray(image) == scene.paint()).all()
    size = [int(root.findtext(f"size/{key}")) for key in ("width", "height")]
    assert size == list(image.size) == [scene.width, scene.height]
    sides = ("xmin", "ymin", "xmax", "ymax")
    written = [
        [int(item.findtext(f"bndbox/{side}")) for side in sides] for item in root.iter("object")
    ]
    # pixels counted from 1, the last one included
    assert written == np.add(scene.boxes.xyxy, [1, 1, 0, 0]).tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_folder_that_cannot_be_written_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(DataError, match=r"'.*' is not empty"):
        write_scenes(tmp_path, images={"train": 1})
    with pytest.raises(DataError, match=r"cannot write '.*mine/out'.*choose another folder"):
        write_scenes(tmp_path / "mine" / "out", images={"train": 1})
    with pytest.raises(ValueError, match="not in tuple"):
        write_scenes(tmp_path / "out", images={"train": 1, "dev": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
