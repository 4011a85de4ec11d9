"""Scenes of handwritten digits with boxes: detection data that needs no download.

A scene has sides of 96 to 160 pixels and 1 to 8 digits on a noisy background. The digits are
enlarged to sides of 12 to 48 pixels; their boxes overlap with an IoU of at most 0.3. The digits are
those of ``raygkd.data.sources.load_digits``; no digit appears in two splits.

Shapes: N digits, M boxes, H height, W width.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raygkd.data.boxes import ImageBoxes
from raygkd.data.seeds import generator
from raygkd.data.sklearn_digits import Digits, load_digits
from raygkd.data.sources import encode_png
from raygkd.data.splits import SPLITS, VAL, choose
from raygkd.errors import DataError
from raygkd.storage.temporary import remove_left_folders, temporary_folder

SCENES = {"train": 800, "val": 100, "test": 300}
"""Scenes of each split of the data set digits-voc."""

SCENE_SIDES = (96, 160)
DIGIT_SIDES = (12, 48)
MOST_DIGITS = 8
MAX_IOU = 0.3
VAL_FRACTION = 0.1
PLACING_TRIES = 20
PAINTING = 1
# opacity below which ink is removed, so that a box has clear edges
FAINTEST_INK = 0.2
# brightness, of 255
DARK, BRIGHT = (0, 90), (150, 255)
UNEVENNESS, NOISE = (0, 25), (2, 14)


@dataclass(frozen=True, eq=False)
class PlacedDigit:
    """A digit in a scene.

    Attributes:
        digit: its number among the digits it was chosen from.
        label: the digit.
        ink_HW: opacity of its ink from 0 to 1, float64; every edge has ink.
        left: column of its left edge in the scene.
        top: row of its upper edge in the scene.
    """

    digit: int
    label: int
    ink_HW: NDArray[np.float64]
    left: int
    top: int

    @property
    def xyxy(self) -> tuple[int, int, int, int]:
        """Its box."""
        height, width = self.ink_HW.shape
        return self.left, self.top, self.left + width, self.top + height


@dataclass(frozen=True, eq=False)
class Scene:
    """An image of digits that is drawn on request.

    Attributes:
        height: height in pixels.
        width: width in pixels.
        placed: its digits, from bottom to top.
        rng_key: key of the random numbers for drawing.
    """

    height: int
    width: int
    placed: list[PlacedDigit]
    rng_key: tuple[int, ...]

    @property
    def boxes(self) -> ImageBoxes:
        """The boxes around the ink of each digit."""
        return ImageBoxes(
            xyxy=np.array([one.xyxy for one in self.placed], np.float32),
            label=np.array([one.label for one in self.placed], np.int64),
            difficult=np.zeros(len(self.placed), bool),
            crowd=np.zeros(len(self.placed), bool),
        )

    def paint(self) -> NDArray[np.uint8]:
        """Return the grey pixels: uneven dark background, bright digits, and noise."""
        rng = generator(*self.rng_key)
        coarse = Image.fromarray(rng.normal(size=(4, 4)).astype(np.float32))
        uneven_HW = np.asarray(coarse.resize((self.width, self.height), Image.Resampling.BICUBIC))
        canvas_HW = rng.uniform(*DARK) + rng.uniform(*UNEVENNESS) * uneven_HW.astype(np.float64)
        for one in self.placed:
            x0, y0, x1, y1 = one.xyxy
            under_HW = canvas_HW[y0:y1, x0:x1]
            under_HW += one.ink_HW * (rng.uniform(*BRIGHT) - under_HW)
        canvas_HW += rng.uniform(*NOISE) * rng.normal(size=canvas_HW.shape)
        return np.rint(canvas_HW.clip(0, 255)).astype(np.uint8)

    def png(self) -> bytes:
        """Return the scene as a PNG."""
        return encode_png(self.paint())


def make_scenes(split: str, images: int, *, seed: int = 0) -> Iterator[Scene]:
    """Yield scenes of a split; a scene does not depend on how many are requested."""
    digits = load_digits()
    chosen = digits_of_split(digits, split)
    for index in range(images):
        key = seed, SPLITS.index(split), index
        rng = generator(*key)
        height, width = rng.integers(*SCENE_SIDES, size=2, endpoint=True).tolist()
        placed = place_digits(digits, chosen, height, width, rng)
        yield Scene(height, width, placed, (*key, PAINTING))


def digits_of_split(digits: Digits, split: str) -> NDArray[np.int64]:
    """Return the indices of the digits in a split's scenes."""
    if split == "test":
        return np.flatnonzero(digits.is_test)
    others = np.flatnonzero(~digits.is_test)
    count = round(VAL_FRACTION * len(others))
    val = choose(others, digits.label, count, rng=generator(0, VAL))
    return val if split == "val" else np.setdiff1d(others, val)


def place_digits(
    digits: Digits,
    chosen: NDArray[np.int64],
    height: int,
    width: int,
    rng: np.random.Generator,
) -> list[PlacedDigit]:
    """Return 1 to 8 digits for a scene; digits for which no free position is found are omitted.

    Args:
        digits: the handwritten digits.
        chosen: indices of the digits that may be used (N,).
        height: height of the scene in pixels.
        width: width of the scene in pixels.
        rng: random generator.
    """
    placed: list[PlacedDigit] = []
    for _ in range(rng.integers(1, MOST_DIGITS, endpoint=True)):
        for _ in range(PLACING_TRIES):
            digit = int(rng.choice(chosen))
            side = int(rng.integers(*DIGIT_SIDES, endpoint=True))
            ink_HW = _ink(digits.images_BHW[digit], side)
            left = int(rng.integers(width - ink_HW.shape[1], endpoint=True))
            top = int(rng.integers(height - ink_HW.shape[0], endpoint=True))
            one = PlacedDigit(digit, int(digits.label[digit]), ink_HW, left, top)
            if all(_iou(one, other) <= MAX_IOU for other in placed):
                placed.append(one)
                break
    return placed


def write_scenes(folder: Path, *, images: Mapping[str, int], seed: int = 0) -> None:
    """Write scenes to a folder in Pascal VOC's layout, which is created when complete.

    Args:
        folder: a folder that does not exist or is empty.
        images: split -> number of scenes.
        seed: seed of the scenes.

    Raises:
        DataError: the folder is not empty or cannot be written.
    """
    folder = Path(os.path.abspath(folder))
    try:
        if folder.exists() and any(folder.iterdir()):
            raise DataError(f"'{folder}' is not empty; choose another folder or remove it first")
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_left_folders(folder.parent)
        with temporary_folder("scenes", parent=folder.parent) as temporary:
            complete = temporary / folder.name
            _write_voc(complete, images, seed)
            os.replace(complete, folder)
    except OSError as error:
        raise DataError(
            f"cannot write '{folder}': {error.strerror}; choose another folder"
        ) from error


def _write_voc(folder: Path, images: Mapping[str, int], seed: int) -> None:
    """Write scenes to a new folder; see ``write_scenes``."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for split, count in images.items():
        names = [scene_name(split, index) for index in range(count)]
        for name, scene in zip(names, make_scenes(split, count, seed=seed), strict=True):
            (folder / "JPEGImages" / f"{name}.png").write_bytes(scene.png())
            _voc_tree(name, scene).write(folder / "Annotations" / f"{name}.xml")
        lines = "".join(f"{name}\n" for name in names)
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text(lines)


def scene_name(split: str, index: int) -> str:
    """Return the image id of a scene."""
    return f"{split}_{index:05d}"


def _ink(image_HW: NDArray[np.uint8], side: int) -> NDArray[np.float64]:
    """Return the ink of a digit, enlarged to a side and cropped to its bounding box."""
    enlarged = Image.fromarray(image_HW).resize((side, side), Image.Resampling.BICUBIC)
    ink_HW = np.asarray(enlarged) / 255
    ink_HW[ink_HW < FAINTEST_INK] = 0
    rows, columns = (np.flatnonzero(ink_HW.any(axis=axis)) for axis in (1, 0))
    return ink_HW[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _iou(one: PlacedDigit, other: PlacedDigit) -> float:
    (a0, b0, a1, b1), (c0, d0, c1, d1) = one.xyxy, other.xyxy
    shared = max(0, min(a1, c1) - max(a0, c0)) * max(0, min(b1, d1) - max(b0, d0))
    return shared / (one.ink_HW.size + other.ink_HW.size - shared)


def _voc_tree(name: str, scene: Scene) -> ElementTree.ElementTree:
    """Return a scene's annotation; VOC counts pixels from 1 and includes a box's last pixel."""
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = f"{name}.png"
    size = ElementTree.SubElement(root, "size")
    for key, value in (("width", scene.width), ("height", scene.height), ("depth", 1)):
        ElementTree.SubElement(size, key).text = str(value)
    for one in scene.placed:
        x0, y0, x1, y1 = one.xyxy
        item = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(item, "name").text = str(one.label)
        ElementTree.SubElement(item, "difficult").text = "0"
        box = ElementTree.SubElement(item, "bndbox")
        for key, value in (("xmin", x0 + 1), ("ymin", y0 + 1), ("xmax", x1), ("ymax", y1)):
            ElementTree.SubElement(box, key).text = str(value)
    ElementTree.indent(root)
    return ElementTree.ElementTree(root)
