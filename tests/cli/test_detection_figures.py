"""Detections and scores by class, as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageColor

from raygkd.data.boxes import ImageBoxes
from raygkd.data.inspect import GAP, MARGIN
from raygkd.metrics.detection import Detections
from raygkd.report.detection_pictures import (
    FOUND,
    LEGEND_HEIGHT,
    TILE,
    TRUTH,
    draw_detections,
    draw_per_class,
)

NAMES = ("cat", "dog")
BLUE, ORANGE = ImageColor.getrgb(TRUTH), ImageColor.getrgb(FOUND)


def objects(*xyxy: Sequence[float]) -> ImageBoxes:
    none = np.zeros(len(xyxy), bool)
    sides = np.array(xyxy, np.float32).reshape(-1, 4)
    return ImageBoxes(sides, np.zeros(len(xyxy), np.int64), none, none)


def found(score: float, *xyxy: Sequence[float]) -> Detections:
    return Detections(
        np.array(xyxy, np.float32).reshape(-1, 4),
        np.ones(len(xyxy), np.int64),
        np.full(len(xyxy), score, np.float32),
    )


def grey(width: int, height: int) -> NDArray[np.uint8]:
    return np.full((height, width, 3), 90, np.uint8)


def drawn(
    folder: Path,
    images: Sequence[NDArray[np.uint8]],
    targets: Sequence[ImageBoxes],
    detections: Sequence[Detections],
    columns: int = 4,
) -> NDArray[np.uint8]:
    """Return the sheet's pixels below the legend, (H, W, 3)."""
    draw_detections(folder / "sheet.png", images, targets, detections, NAMES, columns=columns)
    assert [path.name for path in folder.iterdir()] == ["sheet.png"]
    with Image.open(folder / "sheet.png") as sheet:
        return np.asarray(sheet.convert("RGB"))[LEGEND_HEIGHT:]


def extent(sheet: NDArray[np.uint8], colour: tuple[int, ...]) -> tuple[int, ...]:
    """Return the outer edge of a box of a colour, from its first tile's upper left corner.

    Columns and rows count where most of the box's side has the colour; a tag's are shorter.
    """
    here = (sheet == colour).all(2)
    columns, rows = (np.flatnonzero(n >= 0.9 * n.max()) for n in (here.sum(0), here.sum(1)))
    return columns[0] - MARGIN, rows[0], columns[-1] - MARGIN, rows[-1]


def has(sheet: NDArray[np.uint8], colour: tuple[int, ...]) -> bool:
    return bool((sheet == colour).all(2).any())


def test_boxes_are_drawn_where_they_are_on_an_image_enlarged_by_whole_pixels(
    tmp_path: Path,
) -> None:
    box = [20, 30, 100, 110]
    sheet = drawn(tmp_path, [grey(150, 130)], [objects(box)], [found(0.9)])
    assert sheet.shape == (2 * 130 + MARGIN, 2 * MARGIN + TILE, 3)
    assert extent(sheet, BLUE) == (40, 60, 200, 220)
    assert not has(sheet, ORANGE)
    sheet = drawn(tmp_path, [grey(150, 130)], [objects()], [found(0.9, box)])
    assert extent(sheet, ORANGE) == pytest.approx((40, 60, 200, 220), abs=1)
    assert not has(sheet, BLUE)


def test_a_large_image_is_reduced_with_its_boxes(tmp_path: Path) -> None:
    box = [160, 320, 640, 800]
    sheet = drawn(tmp_path, [grey(800, 960)], [objects()], [found(0.9, box)])
    assert sheet.shape[0] == TILE + MARGIN
    assert extent(sheet, ORANGE) == pytest.approx((53, 107, 213, 267), abs=1)


def test_detections_below_the_threshold_are_left_out(tmp_path: Path) -> None:
    box = [20, 30, 100, 110]
    assert has(drawn(tmp_path, [grey(150, 130)], [objects()], [found(0.31, box)]), ORANGE)
    assert not has(drawn(tmp_path, [grey(150, 130)], [objects()], [found(0.29, box)]), ORANGE)


def test_images_fill_rows_each_as_high_as_its_highest_image(tmp_path: Path) -> None:
    images = [grey(320, 100), grey(160, 160), grey(320, 50), grey(320, 60), grey(320, 70)]
    nothing = [objects()] * 5, [found(0.9)] * 5
    sheet = drawn(tmp_path, images, *nothing, columns=2)
    assert sheet.shape[1] == 2 * TILE + GAP + 2 * MARGIN
    assert sheet.shape[0] == 320 + GAP + 60 + GAP + 70 + MARGIN
    second_row = sheet[320 + GAP + 30, :, 0] == 90
    assert second_row[[MARGIN, MARGIN + TILE - 1, MARGIN + TILE + GAP]].all()
    assert not second_row[[MARGIN - 1, MARGIN + TILE]].any()


@pytest.mark.parametrize("box", [[0, 0, 5, 5], [145, 125, 150, 130], [0, 0, 150, 130]])
def test_tags_stay_inside_the_image(tmp_path: Path, box: list[float]) -> None:
    sheet = drawn(tmp_path, [grey(150, 130)], [objects(box)], [found(0.9, box)])
    inside = sheet[: 2 * 130, MARGIN : MARGIN + 2 * 150]
    white = (sheet == 255).all(2).sum() - (inside == 255).all(2).sum()
    assert white == sheet[..., 0].size - inside[..., 0].size
    assert (inside == 255).all(2).sum() > 20


def test_scores_by_class_are_bars_of_a_colour_for_each_model(tmp_path: Path) -> None:
    path = tmp_path / "bars.png"

    def widths() -> list[int]:
        """Return the pixels of the longest bar of each model."""
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        colours = ((166, 166, 166), (230, 159, 0), (0, 114, 178))
        return [int((pixels == colour).all(2).sum(1).max()) for colour in colours]

    scores = {"teacher": [1.0, None], "student alone": [0.25, None], "best": [0.5, None]}
    draw_per_class(path, NAMES, scores)
    teacher, alone, best = widths()
    assert alone / teacher == pytest.approx(0.25, abs=0.01)
    assert best / teacher == pytest.approx(0.5, abs=0.01)
    assert [item.name for item in tmp_path.iterdir()] == ["bars.png"]
    draw_per_class(path, [f"class {k}" for k in range(80)], {"teacher": [0.5] * 80})
    assert widths()[1] == 0
