"""Pictures of predictions: boxes drawn on each image, or sheets of labelled images.

Shapes: C channels (3), H height, W width.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePath

from PIL import Image, ImageDraw, ImageFont

from raygkd.data.decoding import decode
from raygkd.data.inspect import BACKGROUND, FAINT, GAP, INK, MARGIN, SMALL_FONT_SIZE
from raygkd.deploy.facts import Facts, Prediction
from raygkd.storage.atomic_files import whole_file

# of a sheet: side of an image and height of the two lines below it in pixels, columns and rows
TILE, TEXT_HEIGHT, COLUMNS, ROWS = 112, 34, 8, 8
# longest side below which an image with boxes is enlarged, in pixels
SMALL = 320
# told apart by every kind of colour vision (Okabe and Ito)
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK_ON = ("white", "white", "white", "white", "black", "black")


class Pictures:
    """Draws images as they arrive: a PNG of each with its boxes, or sheets of 64 with classes.

    Args:
        folder: for the pictures.
        facts: of the model.
    """

    def __init__(self, folder: Path, facts: Facts):
        self._folder, self._facts = folder, facts
        self._drawn = 0
        self._tiles: list[Image.Image] = []

    def add(self, predicted: Prediction) -> None:
        """Draw an image."""
        image = Image.fromarray(decode(predicted.content).permute(1, 2, 0).numpy())
        self._drawn += 1
        if predicted.box is not None:
            stem = re.sub(r"[^\w.-]", "_", PurePath(predicted.name).stem)
            row = "" if predicted.row is None else f"-row-{predicted.row}"
            name = f"{self._drawn:06}-{stem}{row}.png"
            self._save(_with_boxes(image, predicted, self._facts.class_names), name)
            return
        best = self._facts.class_names[predicted.label[0]]
        where = PurePath(predicted.name).name
        if predicted.row is not None:
            where += f" row {predicted.row}"
        self._tiles.append(_labelled(image, f"{best} {predicted.score[0]:.2f}", where))
        if len(self._tiles) == COLUMNS * ROWS:
            self.close()

    def close(self) -> None:
        """Write the last, partial sheet."""
        if not self._tiles:
            return
        rows = -(-len(self._tiles) // COLUMNS)
        columns = min(COLUMNS, len(self._tiles))
        width = 2 * MARGIN + columns * (TILE + GAP) - GAP
        height = 2 * MARGIN + rows * (TILE + TEXT_HEIGHT + GAP) - GAP
        sheet = Image.new("RGB", (width, height), BACKGROUND)
        for place, tile in enumerate(self._tiles):
            row, column = divmod(place, COLUMNS)
            corner = MARGIN + column * (TILE + GAP), MARGIN + row * (TILE + TEXT_HEIGHT + GAP)
            sheet.paste(tile, corner)
        self._tiles = []
        number = -(-self._drawn // (COLUMNS * ROWS))
        self._save(sheet, f"sheet-{number:04}.png")

    def _save(self, picture: Image.Image, name: str) -> None:
        with whole_file(self._folder / name) as temporary:
            picture.save(temporary, "PNG")


def _labelled(image: Image.Image, text: str, where: str) -> Image.Image:
    """Return an image in a square with two lines of text below it."""
    scale = TILE // max(image.size) or TILE / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    sampling = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    shown = image.resize(size, sampling)
    tile = Image.new("RGB", (TILE, TILE + TEXT_HEIGHT), BACKGROUND)
    tile.paste(shown, ((TILE - shown.width) // 2, (TILE - shown.height) // 2))
    draw = ImageDraw.Draw(tile)
    font, small = (ImageFont.load_default(size) for size in (SMALL_FONT_SIZE, SMALL_FONT_SIZE - 3))
    draw.text((TILE / 2, TILE + 2), _shortened(text, font), INK, font, anchor="ma")
    draw.text((TILE / 2, TILE + 18), _shortened(where, small), FAINT, small, anchor="ma")
    return tile


def _shortened(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """Return the end of a text that is wider than a tile, since file names differ there."""
    if font.getlength(text) <= TILE:
        return text
    while text and font.getlength("…" + text) > TILE:
        text = text[1:]
    return "…" + text


def _with_boxes(
    image: Image.Image, predicted: Prediction, class_names: tuple[str, ...]
) -> Image.Image:
    """Return an image with its boxes, the best on top; small images are enlarged."""
    scale = max(1, SMALL // max(image.size))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(image)
    # lines and text that are still seen when a large photograph is shown small
    line = max(2, round(max(image.size) / 400))
    font = ImageFont.load_default(max(SMALL_FONT_SIZE, round(max(image.size) / 55)))
    assert predicted.box is not None
    marks = list(zip(predicted.label.tolist(), predicted.score, predicted.box * scale))[::-1]
    for label, _, box in marks:
        draw.rectangle(box.tolist(), outline=COLOURS[label % len(COLOURS)], width=line)
    for label, score, (x0, y0, _, _) in marks:
        text = f"{class_names[label]} {score:.2f}"
        left, top, right, bottom = draw.textbbox((0, 0), text, font)
        width, height = right - left + 4, bottom - top + 4
        x = max(0, min(float(x0), image.width - width))
        y = float(y0) - height if y0 >= height else float(y0)
        colour = label % len(COLOURS)
        draw.rectangle((x, y, x + width, y + height), fill=COLOURS[colour])
        draw.text((x + 2 - left, y + 2 - top), text, INK_ON[colour], font)
    return image
