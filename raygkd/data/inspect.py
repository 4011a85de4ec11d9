"""What is in a table: numbers, and a labelled sheet of sample images.

Shapes: C channels (3), H height, W width.
"""

from __future__ import annotations

import io
import os
import statistics
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from raygkd.data.plan import shuffled
from raygkd.data.splits import SPLITS
from raygkd.data.windows import decode_rows
from raygkd.errors import DataError

if TYPE_CHECKING:
    from raygkd.data.parquet import ImageTable

# of the sheet, in pixels
TILE = 64
GAP = 4
MARGIN = 16
TITLE_HEIGHT = 48
LABEL_WIDTH = 160
FONT_SIZE, SMALL_FONT_SIZE = 16, 13
BACKGROUND, INK, FAINT = "white", "#1a1a1a", "#6b6b6b"


def table_info(table: ImageTable, *, sample: int = 256) -> dict[str, Any]:
    """Return counts of a table, and the sizes and formats of a sample of its images.

    Args:
        table: what to describe.
        sample: most images whose header is read; they are the same every time.

    Returns:
        "path", "dataset", "images", "files", "bytes", "splits" (name -> images), "classes" (class
        name -> split -> images), "sampled" (images looked at), "width" and "height" (each "min",
        "median", "max" in pixels, or empty), "uniform_size" (all sampled images have one size),
        "formats" (name -> images), "bad" (sampled images whose header cannot be read).
    """
    rows = shuffled(np.arange(len(table)), table.units.first, seed=0)[:sample]
    sizes, formats, bad = _headers(table.read(rows))
    return {
        "path": table.path,
        "dataset": table.dataset,
        "images": len(table),
        "files": len(table.files),
        "bytes": table.size_bytes,
        "splits": {split: len(table.rows(split)) for split in SPLITS},
        "classes": _class_counts(table),
        "sampled": len(rows),
        "width": _spread([width for width, _ in sizes]),
        "height": _spread([height for _, height in sizes]),
        "uniform_size": len(set(sizes)) == 1,
        "formats": dict(formats.most_common()),
        "bad": bad,
    }


def sample_sheet(
    table: ImageTable, path_png: str, *, columns: int = 10, max_classes: int = 40
) -> None:
    """Write a PNG with a row of sample images for each class; small images keep their pixels.

    Training images are shown where a class has them. Broken images are left out.

    Args:
        table: where the images lie.
        path_png: file to write; replaced at once when the sheet is complete.
        columns: images of each class.
        max_classes: rows of the sheet; a line below tells how many classes it leaves out.

    Raises:
        DataError: the file cannot be written.
    """
    shown = min(len(table.class_names), max_classes)
    sheet = _blank_sheet(table, shown, columns)
    rows = _sample_rows(table, shown, columns)
    filled: Counter[int] = Counter()
    for label, image_CHW in zip(
        table.labels[rows].tolist(), decode_rows(table, rows, skip_bad=True)
    ):
        if image_CHW is not None:
            left = MARGIN + LABEL_WIDTH + filled[label] * (TILE + GAP)
            sheet.paste(_tile(image_CHW), (left, _top(label)))
            filled[label] += 1
    temporary = f"{path_png}.{os.getpid()}.tmp"
    try:
        sheet.save(temporary, "PNG")
        os.replace(temporary, path_png)
    except OSError as error:
        raise DataError(f"cannot write '{path_png}': {error.strerror}") from error


def _headers(images: list[bytes]) -> tuple[list[tuple[int, int]], Counter[str], int]:
    """Return sizes, formats, and how many headers cannot be read."""
    sizes, formats, bad = [], Counter[str](), 0
    for encoded in images:
        try:
            with Image.open(io.BytesIO(encoded)) as image:
                sizes.append(image.size)
                formats[image.format or "unknown"] += 1
        except OSError:
            bad += 1
    return sizes, formats, bad


def _spread(values: list[int]) -> dict[str, float]:
    if not values:
        return {}
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def _class_counts(table: ImageTable) -> dict[str, dict[str, int]]:
    places = table.labels * len(SPLITS) + table.splits
    counts = np.bincount(places, minlength=len(table.class_names) * len(SPLITS))
    return {
        name: dict(zip(SPLITS, row.tolist()))
        for name, row in zip(table.class_names, counts.reshape(-1, len(SPLITS)), strict=True)
    }


def _sample_rows(table: ImageTable, classes: int, columns: int) -> NDArray[np.int64]:
    """Return up to ``columns`` rows of each of the first classes, training rows first."""
    mixed = shuffled(np.arange(len(table)), table.units.first, seed=0)
    mixed = mixed[np.argsort(table.splits[mixed], kind="stable")]
    labels = table.labels[mixed]
    return np.concatenate([mixed[labels == label][:columns] for label in range(classes)])


def _blank_sheet(table: ImageTable, classes: int, columns: int) -> Image.Image:
    """Return the sheet with its title and the classes' names and counts, without images."""
    left_out = len(table.class_names) - classes
    width = 2 * MARGIN + LABEL_WIDTH + columns * (TILE + GAP) - GAP
    height = _top(classes) - GAP + (2 * MARGIN if left_out else MARGIN)
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font, small = (ImageFont.load_default(size) for size in (FONT_SIZE, SMALL_FONT_SIZE))
    sizes = {split: len(table.rows(split)) for split in SPLITS}
    splits = ", ".join(f"{split} {size:,}" for split, size in sizes.items() if size)
    title = f"{table.dataset or os.path.basename(table.path)}: {len(table):,} images ({splits})"
    draw.text((MARGIN, MARGIN), _shortened(title, width - 2 * MARGIN, font), INK, font)
    counts = np.bincount(table.labels, minlength=len(table.class_names))
    for label, name in enumerate(table.class_names[:classes]):
        middle = _top(label) + TILE // 2
        name = _shortened(name, LABEL_WIDTH - MARGIN, font)
        draw.text((MARGIN, middle), name, INK, font, anchor="ls")
        draw.text((MARGIN, middle + 5), f"{counts[label]:,} images", FAINT, small, anchor="la")
    if left_out:
        note = f"and {left_out:,} more classes"
        draw.text((MARGIN, height - MARGIN), note, FAINT, small, anchor="ls")
    return sheet


def _top(label: int) -> int:
    return TITLE_HEIGHT + label * (TILE + GAP)


def _shortened(text: str, width: int, font: Any) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _tile(image_CHW: Tensor) -> Image.Image:
    """Return an image inside a square, enlarged by whole pixels or reduced to fit."""
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
