"""Pictures of detections.

Shapes: H height, W width, C channels (3: red, green, blue).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from raygkd.data.boxes import ImageBoxes
from raygkd.data.inspect import BACKGROUND, FONT_SIZE, GAP, INK, MARGIN, SMALL_FONT_SIZE
from raygkd.metrics.detection import Detections
from raygkd.report.figures import BLUE, DOTS_PER_INCH, GREEN, ORANGE
from raygkd.storage.atomic_files import Place, whole_file

# longest side of an image on the sheet, and heights of the legend and of a class's tag, in pixels
TILE = 320
LEGEND_HEIGHT = 44
TAG_HEIGHT = SMALL_FONT_SIZE + 2
# told apart by every kind of colour vision
TRUTH, FOUND = "#0072b2", "#d55e00"
MODEL_COLOURS = ("0.65", ORANGE, BLUE, GREEN)
# of the bars' figure, in inches
BAR_HEIGHT, CLASS_GAP, FRAME_HEIGHT = 0.14, 0.1, 1.2


def draw_detections(
    path_png: Place,
    images: Sequence[NDArray[np.uint8]],
    targets: Sequence[ImageBoxes],
    detections: Sequence[Detections],
    class_names: Sequence[str],
    *,
    threshold: float = 0.3,
    columns: int = 4,
) -> None:
    """Write a PNG of images with their objects and detections, atomically.

    Each box has its class below (objects, in blue) or above (detections, in orange, with their
    score). Small images are enlarged by whole pixels, large ones reduced.

    Args:
        path_png: of the picture.
        images: upright RGB, (H, W, C) each, at least one.
        targets: the objects of each image.
        detections: of each image.
        class_names: by label.
        threshold: minimum score of a detection to draw.
        columns: images per row.
    """
    tiles = [
        _tile(image, objects, found, class_names, threshold)
        for image, objects, found in zip(images, targets, detections, strict=True)
    ]
    rows = [tiles[begin : begin + columns] for begin in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) + GAP for row in rows]
    width = 2 * MARGIN + min(columns, len(tiles)) * (TILE + GAP) - GAP
    sheet = Image.new("RGB", (width, LEGEND_HEIGHT + sum(heights) - GAP + MARGIN), BACKGROUND)
    _draw_legend(ImageDraw.Draw(sheet), threshold)
    for place, row in enumerate(rows):
        for column, tile in enumerate(row):
            sheet.paste(
                tile, (MARGIN + column * (TILE + GAP), LEGEND_HEIGHT + sum(heights[:place]))
            )
    with whole_file(path_png) as temporary:
        sheet.save(temporary, "PNG")


def draw_per_class(
    path_png: Place,
    class_names: Sequence[str],
    scores: Mapping[str, Sequence[float | None]],
    *,
    measure: str = "average precision at IoU 0.5",
) -> None:
    """Write a PNG of scores by class, with one bar per model, atomically.

    Args:
        path_png: of the picture.
        class_names: by label.
        scores: name of the model in the legend -> score of each class in 0..1, None for a class
            without objects; 1 to 4 models.
        measure: what the scores are.
    """
    from matplotlib.figure import Figure

    class_height = len(scores) * BAR_HEIGHT + CLASS_GAP
    figure = Figure(
        figsize=(8, FRAME_HEIGHT + len(class_names) * class_height), layout="constrained"
    )
    axes = figure.add_subplot(xlabel=measure, xlim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    places = np.arange(len(class_names)) * class_height
    for number, (model, by_class) in enumerate(scores.items()):
        below = places + (number - (len(scores) - 1) / 2) * BAR_HEIGHT
        widths = [score or 0.0 for score in by_class]
        axes.barh(below, widths, BAR_HEIGHT, color=MODEL_COLOURS[number], label=model)
    without = [all(by_class[k] is None for by_class in scores.values()) for k in range(len(places))]
    names = [f"{name} (no objects)" if no else name for name, no in zip(class_names, without)]
    axes.set_yticks(places, names)
    axes.set_ylim(places[-1] + class_height / 2, places[0] - class_height / 2)
    figure.legend(loc="outside upper center", ncols=len(scores), frameon=False)
    with whole_file(path_png) as temporary:
        figure.savefig(temporary, format="png", dpi=DOTS_PER_INCH)


def _tile(
    image: NDArray[np.uint8],
    objects: ImageBoxes,
    found: Detections,
    class_names: Sequence[str],
    threshold: float,
) -> Image.Image:
    """Return an image with its boxes, scaled so that its longer side is at most ``TILE``."""
    tile = Image.fromarray(image)
    longest = max(tile.size)
    scale = TILE // longest or TILE / longest
    size = (max(1, round(tile.width * scale)), max(1, round(tile.height * scale)))
    sampling = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    tile = tile.resize(size, sampling)
    shown = found.score >= threshold
    found_columns = (found.xyxy[shown] * scale).tolist(), found.label[shown], found.score[shown]
    marks = [
        (TRUTH, box, class_names[label])
        for box, label in zip((objects.xyxy * scale).tolist(), objects.label)
    ]
    marks += [
        (FOUND, box, f"{class_names[label]} {score:.2f}")
        for box, label, score in zip(*found_columns)
    ]
    draw = ImageDraw.Draw(tile)
    for colour, box, _ in marks:
        draw.rectangle(box, outline=colour, width=3 if colour == TRUTH else 2)
    # above all boxes
    for mark in marks:
        _draw_tag(draw, tile.size, *mark)
    return tile


def _draw_tag(
    draw: ImageDraw.ImageDraw, size: tuple[int, int], colour: str, box: list[float], text: str
) -> None:
    """Write below an object or above a detection, but inside the tile."""
    font = ImageFont.load_default(SMALL_FONT_SIZE)
    width = font.getlength(text) + 4
    left = max(0.0, min(box[0], size[0] - 1 - width))
    top = box[3] if colour == TRUTH else box[1] - TAG_HEIGHT
    top = max(0.0, min(top, size[1] - 1 - TAG_HEIGHT))
    draw.rectangle((left, top, left + width, top + TAG_HEIGHT), fill=colour)
    draw.text((left + 2, top + TAG_HEIGHT / 2 + 1), text, "white", font, anchor="lm")


def _draw_legend(draw: ImageDraw.ImageDraw, threshold: float) -> None:
    font, left = ImageFont.load_default(FONT_SIZE), float(MARGIN)
    entries = ((TRUTH, "object"), (FOUND, f"detection with score {threshold:g} or more"))
    for colour, text in entries:
        middle = LEGEND_HEIGHT / 2
        draw.rectangle((left, middle - 8, left + 16, middle + 8), outline=colour, width=3)
        draw.text((left + 24, middle), text, INK, font, anchor="lm")
        left += 48 + font.getlength(text)
