"""Images and boxes on the canvas: boxes follow the pixels, whatever the changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raygkd.data.box_transforms import FILL, KINDS, BoxTransform, build_box_transform
from raygkd.data.boxes import ImageBoxes
from raygkd.errors import ConfigError

RED = torch.tensor([255, 0, 0], dtype=torch.uint8)


def boxes_of(*sides: tuple[float, float, float, float], crowd: bool = False) -> ImageBoxes:
    count = len(sides)
    return ImageBoxes(
        xyxy=np.array(sides, np.float32).reshape(count, 4),
        label=np.arange(count),
        difficult=np.zeros(count, bool),
        crowd=np.full(count, crowd),
    )


def scene(height: int, width: int, box: tuple[int, int, int, int]) -> torch.Tensor:
    """Return a black image with one red rectangle."""
    image_CHW = torch.zeros(3, height, width, dtype=torch.uint8)
    x0, y0, x1, y1 = box
    image_CHW[:, y0:y1, x0:x1] = RED[:, None, None]
    return image_CHW


def around_red(image_CHW: np.ndarray) -> tuple[int, int, int, int]:
    """Return the box around the pixels that are more red than anything else."""
    red = image_CHW.astype(int)
    y, x = np.nonzero(red[0] - red[1:].max(0) > 60)
    return x.min(), y.min(), x.max() + 1, y.max() + 1


def at(transform: BoxTransform, image: torch.Tensor, boxes: ImageBoxes, row: int = 0) -> dict:
    return transform.sample(image, boxes, seed=1, epoch=2, row=row)


def test_evaluation_fills_the_canvas_with_the_longer_side() -> None:
    transform = build_box_transform("jitter-flip", 64, train=False, most=3)
    sample = at(transform, scene(50, 100, (20, 10, 60, 40)), boxes_of((20, 10, 60, 40)))
    assert sample["image"].shape == (3, 64, 64)
    assert sample["ratio"] == np.float32(0.64)
    assert (sample["image"][:, 32:] == FILL).all()
    assert np.allclose(sample["boxes"][0], np.array([20, 10, 60, 40]) * 0.64)
    assert sample["classes"].tolist() == [0, -1, -1]
    # so that what is found on the canvas can be put back on the image
    assert np.allclose(sample["boxes"][0] / sample["ratio"], [20, 10, 60, 40], atol=1e-4)


def test_an_image_of_the_canvas_size_keeps_its_pixels() -> None:
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    sample = at(
        build_box_transform("none", 64, train=True, most=1), image, boxes_of((1, 2, 30, 40))
    )
    assert np.array_equal(sample["image"], image.numpy())
    assert sample["boxes"].tolist() == [[1, 2, 30, 40]]


@pytest.mark.parametrize("kind", ["jitter", "jitter-flip"])
def test_boxes_follow_the_pixels_through_random_changes(kind: str) -> None:
    transform = build_box_transform(kind, 96, train=True, most=1)
    box = (60, 30, 110, 75)
    image, boxes = scene(90, 150, box), boxes_of(box)
    seen = []
    for row in range(40):
        sample = at(transform, image, boxes, row)
        if sample["classes"][0] >= 0:
            seen.append(sample["boxes"][0])
            assert np.abs(sample["boxes"][0] - around_red(sample["image"])).max() <= 1.5
    assert len(seen) > 30
    assert np.std(seen, axis=0).min() > 3


def test_half_of_the_images_are_mirrored_and_only_with_flip() -> None:
    box = (0, 0, 40, 80)
    image, boxes = scene(80, 80, box), boxes_of(box)
    image[0, :, :20], image[1, :, :20], image[2, :, :20] = 0, 255, 0
    mirrored = {}
    for kind in ("jitter", "jitter-flip"):
        transform = build_box_transform(kind, 80, train=True, most=1)
        samples = [at(transform, image, boxes, row) for row in range(60)]
        # green lies left of red, unless the image is mirrored
        mirrored[kind] = sum(_mean_x(s["image"], 1) > _mean_x(s["image"], 0) for s in samples)
    assert mirrored["jitter"] == 0
    assert 15 < mirrored["jitter-flip"] < 45


def _mean_x(image_CHW: np.ndarray, channel: int) -> float:
    other = image_CHW.astype(int)[[c for c in range(3) if c != channel]].max(0)
    _, x = np.nonzero(image_CHW[channel].astype(int) - other > 60)
    return float(x.mean()) if len(x) else -1.0 if channel == 1 else 0.0


def test_boxes_that_a_crop_cuts_off_are_left_out_and_others_clipped() -> None:
    transform = build_box_transform("jitter", 64, train=True, most=64)
    corners = [(x, y, x + 8.0, y + 8.0) for x in range(0, 64, 8) for y in range(0, 64, 8)]
    image, boxes = torch.zeros(3, 64, 64, dtype=torch.uint8), boxes_of(*corners)
    counts = set()
    for row in range(30):
        sample = at(transform, image, boxes, row)
        kept = sample["boxes"][sample["classes"] >= 0]
        assert ((kept >= 0) & (kept <= 64)).all()
        assert (kept[:, 2:] - kept[:, :2] >= 2).all()
        counts.add(len(kept))
    assert 64 in counts
    assert min(counts) < 60


def test_crowds_are_no_objects_and_images_without_boxes_are_samples() -> None:
    transform = build_box_transform("none", 32, train=True, most=2)
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    for boxes in (boxes_of(), boxes_of((1, 1, 20, 20), crowd=True)):
        assert at(transform, image, boxes)["classes"].tolist() == [-1, -1]


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (1, 1), (97, 33)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_size_of_image_gives_one_shape(kind: str, size: tuple[int, int]) -> None:
    transform = build_box_transform(kind, 64, train=True, most=1)
    image = torch.zeros(3, *size, dtype=torch.uint8)
    blank = transform.blank()
    for row in range(5):
        sample = at(transform, image, boxes_of((0, 0, size[1], size[0])), row)
        assert {n: (v.shape, v.dtype) for n, v in sample.items()} == {
            n: (v.shape, v.dtype) for n, v in blank.items()
        }


def test_a_sample_depends_on_seed_epoch_and_row_alone() -> None:
    transform = build_box_transform("jitter-flip", 64, train=True, most=1)
    image, boxes = scene(60, 80, (10, 10, 50, 50)), boxes_of((10, 10, 50, 50))
    torch.manual_seed(0)
    first = transform.sample(image, boxes, seed=1, epoch=2, row=3)
    torch.manual_seed(9)
    again = transform.sample(image, boxes, seed=1, epoch=2, row=3)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    for change in ({"seed": 5}, {"epoch": 5}, {"row": 5}):
        other = transform.sample(image, boxes, **{"seed": 1, "epoch": 2, "row": 3, **change})
        assert not np.array_equal(first["image"], other["image"])
    # neither is changed in place
    assert boxes.xyxy.tolist() == [[10, 10, 50, 50]]
    assert torch.equal(image, scene(60, 80, (10, 10, 50, 50)))


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"crop.*object detection.*none, jitter, jitter-flip"):
        build_box_transform("crop", 64, train=True, most=1)
