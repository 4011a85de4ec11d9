"""The contents of a table: statistics, and a labelled sheet of sample images.

Shapes: C channels (3), H height, W width, M boxes.
"""

from __future__ import annotations

import colorsys
import io
import os
import statistics
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from raygkd.data.boxes import Boxes, ImageBoxes
from raygkd.data.plan import shuffled
from raygkd.data.splits import NO_LABEL, SPLITS
from raygkd.data.windows import decode_rows
from raygkd.errors import DataError, StorageError
from raygkd.storage.atomic_files import whole_file

if TYPE_CHECKING:
    from raygkd.data.parquet import ImageTable

# measures of the sheet, in pixels
TILE = 64
BOX_TILE = 160
BOX_ROWS = 5
GAP = 4
MARGIN = 16
TITLE_HEIGHT = 48
LABEL_WIDTH = 160
FONT_SIZE, SMALL_FONT_SIZE, BOX_FONT_SIZE = 16, 13, 10
BACKGROUND, INK, FAINT = "white", "#1a1a1a", "#6b6b6b"


def table_info(table: ImageTable, *, sample: int = 256) -> dict[str, Any]:
    """Return counts of a table, and the sizes and formats of a sample of its images.

    Args:
        table: the table.
        sample: maximum number of images whose headers are read; the sample is fixed.

    Returns:
        "path", "dataset", "images", "files", "bytes", "splits" (name -> images), "classes" (class
        name -> split -> images), "unlabelled" (images without a label), "sampled" (number of
        sampled images), "width" and "height" (each "min", "median", "max" in pixels, or empty),
        "uniform_size" (whether all sampled images have the same size), "formats" (name -> images),
        "bad" (sampled images with unreadable headers), "warnings" (a line per kind of fault found
        when it was prepared).

        For detection, "classes" is class name -> "images", "boxes", "difficult", "crowd"; "task"
        ("detection"), "boxes", "difficult", "crowd" (over all classes) and "boxes_per_image"
        ("min", "median", "max") are added.
    """
    rows = shuffled(np.arange(len(table)), table.units.first, seed=0)[:sample]
    sizes, formats, bad = headers(table.read(rows))
    info = {
        "path": table.path,
        "dataset": table.dataset,
        "images": len(table),
        "files": len(table.files),
        "bytes": table.size_bytes,
        "splits": {split: len(table.rows(split)) for split in SPLITS},
        "classes": _class_counts(table),
        "unlabelled": int((table.labels == NO_LABEL).sum()),
        "sampled": len(rows),
        "width": spread([width for width, _ in sizes]),
        "height": spread([height for _, height in sizes]),
        "uniform_size": len(set(sizes)) == 1,
        "formats": dict(formats.most_common()),
        "bad": bad,
        "warnings": list(table.warnings),
    }
    return info if table.boxes is None else info | box_facts(table.class_names, table.boxes)


def sample_sheet(
    table: ImageTable, path_png: str, *, columns: int = 10, max_classes: int = 40
) -> None:
    """Write a PNG of sample images.

    It has a row of images for each class, and one for those without a label, in which small images
    are enlarged by whole factors. For detection, it has five rows of images with their boxes and
    classes. Training images are shown first, unreadable images are omitted.

    Args:
        table: table of the images.
        path_png: file to write; replaced only when the sheet is complete.
        columns: images per row.
        max_classes: maximum number of rows; a line below them states how many classes are omitted.
            Ignored for detection.

    Raises:
        DataError: the file cannot be written.
    """
    if table.boxes is None:
        sheet = _class_sheet(table, columns, max_classes)
    else:
        sheet = _box_sheet(table, table.boxes, columns)
    try:
        with whole_file(path_png) as temporary:
            sheet.save(temporary, "PNG")
    except (OSError, StorageError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).rpartition(": ")[2]
        raise DataError(f"cannot write '{path_png}': {reason}") from error


def headers(images: list[bytes]) -> tuple[list[tuple[int, int]], Counter[str], int]:
    """Return sizes, formats, and the number of unreadable headers."""
    sizes, formats, bad = [], Counter[str](), 0
    for encoded in images:
        try:
            with Image.open(io.BytesIO(encoded)) as image:
                sizes.append(image.size)
                formats[image.format or "unknown"] += 1
        except OSError:
            bad += 1
    return sizes, formats, bad


def spread(values: list[int]) -> dict[str, float]:
    """Return "min", "median" and "max" of values; nothing of none."""
    if not values:
        return {}
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def _class_counts(table: ImageTable) -> dict[str, dict[str, int]]:
    if not table.class_names:
        return {}
    is_labelled = table.labels != NO_LABEL
    places = (table.labels * len(SPLITS) + table.splits)[is_labelled]
    counts = np.bincount(places, minlength=len(table.class_names) * len(SPLITS))
    return {
        name: dict(zip(SPLITS, row.tolist()))
        for name, row in zip(table.class_names, counts.reshape(-1, len(SPLITS)), strict=True)
    }


def box_facts(class_names: tuple[str, ...], boxes: Boxes) -> dict[str, Any]:
    """Return what ``table_info`` adds for detection."""
    every, counts = boxes.every, np.diff(boxes.first)
    image = np.repeat(np.arange(len(boxes)), counts)
    # np.unique does not take an empty axis
    pairs = np.stack([image, every.label])
    with_class = np.unique(pairs, axis=1)[1] if len(every) else every.label
    per_class = {
        "images": with_class,
        "boxes": every.label,
        "difficult": every.label[every.difficult],
        "crowd": every.label[every.crowd],
    }
    numbers = {
        name: np.bincount(labels, minlength=len(class_names)).tolist()
        for name, labels in per_class.items()
    }
    return {
        "task": "detection",
        "classes": {
            name: {key: numbers[key][label] for key in numbers}
            for label, name in enumerate(class_names)
        },
        "boxes": len(every),
        "difficult": int(every.difficult.sum()),
        "crowd": int(every.crowd.sum()),
        "boxes_per_image": spread(counts.tolist()),
    }


def _mixed_rows(table: ImageTable) -> NDArray[np.int64]:
    """Return all rows in random order, training rows first."""
    mixed = shuffled(np.arange(len(table)), table.units.first, seed=0)
    return mixed[np.argsort(table.splits[mixed], kind="stable")]


def _class_sheet(table: ImageTable, columns: int, max_classes: int) -> Image.Image:
    """Return a row of images for each of the first classes, then one of those without a label."""
    mixed = _mixed_rows(table)
    labels = table.labels[mixed]
    shown = list(range(min(len(table.class_names), max_classes)))
    shown += [NO_LABEL] if (labels == NO_LABEL).any() else []
    rows = np.concatenate([mixed[labels == label][:columns] for label in shown])
    sheet = _blank_sheet(table, shown, columns)
    filled: Counter[int] = Counter()
    for label, image_CHW in zip(
        table.labels[rows].tolist(), decode_rows(table, rows, skip_bad=True)
    ):
        if image_CHW is not None:
            left = MARGIN + LABEL_WIDTH + filled[label] * (TILE + GAP)
            sheet.paste(_tile(image_CHW), (left, _top(shown.index(label))))
            filled[label] += 1
    return sheet


def _box_sheet(table: ImageTable, boxes: Boxes, columns: int) -> Image.Image:
    """Return rows of images with their boxes."""
    rows = _mixed_rows(table)[: columns * BOX_ROWS]
    lines = -(-len(rows) // columns)
    width = 2 * MARGIN + columns * (BOX_TILE + GAP) - GAP
    height = TITLE_HEIGHT + lines * (BOX_TILE + GAP) - GAP + MARGIN
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    _draw_title(sheet, table)
    place = 0
    for row, image_CHW in zip(rows, decode_rows(table, rows, skip_bad=True)):
        if image_CHW is not None:
            line, column = divmod(place, columns)
            corner = (MARGIN + column * (BOX_TILE + GAP), TITLE_HEIGHT + line * (BOX_TILE + GAP))
            sheet.paste(_box_tile(image_CHW, boxes[row], table.class_names), corner)
            place += 1
    return sheet


def _box_tile(image_CHW: Tensor, boxes: ImageBoxes, class_names: tuple[str, ...]) -> Image.Image:
    """Return a square tile with an image and its boxes in the upper left corner."""
    image = Image.fromarray(image_CHW.permute(1, 2, 0).numpy())
    ratio = BOX_TILE / max(image.size)
    size = max(1, round(image.width * ratio)), max(1, round(image.height * ratio))
    tile = Image.new("RGB", (BOX_TILE, BOX_TILE), BACKGROUND)
    tile.paste(image.resize(size, Image.Resampling.BILINEAR))
    draw = ImageDraw.Draw(tile)
    font = ImageFont.load_default(BOX_FONT_SIZE)
    for (x0, y0, x1, y1), label in zip((boxes.xyxy * ratio).tolist(), boxes.label.tolist()):
        # hues of consecutive classes are far apart
        hue = label * 0.618 % 1
        red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.9, 0.9))
        colour = (red, green, blue)
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour)
        # above the box, if there is room
        place = (x0 + 1, max(0, y0 - BOX_FONT_SIZE))
        draw.rectangle(draw.textbbox(place, class_names[label], font), fill=colour)
        draw.text(place, class_names[label], BACKGROUND, font)
    return tile


def _blank_sheet(table: ImageTable, shown: list[int], columns: int) -> Image.Image:
    """Return the sheet with its title and the classes' names and counts, without images."""
    omitted = len(table.class_names) - sum(label != NO_LABEL for label in shown)
    width = 2 * MARGIN + LABEL_WIDTH + columns * (TILE + GAP) - GAP
    height = _top(len(shown)) - GAP + (2 * MARGIN if omitted else MARGIN)
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    _draw_title(sheet, table)
    draw = ImageDraw.Draw(sheet)
    font, small = (ImageFont.load_default(size) for size in (FONT_SIZE, SMALL_FONT_SIZE))
    for place, label in enumerate(shown):
        middle = _top(place) + TILE // 2
        name = "no label" if label == NO_LABEL else table.class_names[label]
        name = _shortened(name, LABEL_WIDTH - MARGIN, font)
        count = int((table.labels == label).sum())
        draw.text((MARGIN, middle), name, INK, font, anchor="ls")
        draw.text((MARGIN, middle + 5), f"{count:,} images", FAINT, small, anchor="la")
    if omitted:
        note = f"and {omitted:,} more classes"
        draw.text((MARGIN, height - MARGIN), note, FAINT, small, anchor="ls")
    return sheet


def _draw_title(sheet: Image.Image, table: ImageTable) -> None:
    font = ImageFont.load_default(FONT_SIZE)
    sizes = {split: len(table.rows(split)) for split in SPLITS}
    splits = ", ".join(f"{split} {size:,}" for split, size in sizes.items() if size)
    title = f"{table.dataset or os.path.basename(table.path)}: {len(table):,} images ({splits})"
    title = _shortened(title, sheet.width - 2 * MARGIN, font)
    ImageDraw.Draw(sheet).text((MARGIN, MARGIN), title, INK, font)


def _top(label: int) -> int:
    return TITLE_HEIGHT + label * (TILE + GAP)


def _shortened(text: str, width: int, font: Any) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _tile(image_CHW: Tensor) -> Image.Image:
    """Return a square tile with an image, enlarged by a whole factor or reduced to fit."""
    image = Image.fromarray(image_CHW.permute(1, 2, 0).numpy())
    factor = TILE // max(image.size)
    if factor:
        image = image.resize(
            (image.width * factor, image.height * factor), Image.Resampling.NEAREST
        )
    else:
        image.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
    tile = Image.new("RGB", (TILE, TILE), BACKGROUND)
    tile.paste(image, ((TILE - image.width) // 2, (TILE - image.height) // 2))
    return tile
