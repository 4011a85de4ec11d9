"""Classes, boxes and splits equal those of public readers on the same files."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torchvision.datasets
import yaml
from layouts import (
    coco_contents,
    tar_members,
    write_coco,
    write_image,
    write_table,
    write_tar,
    write_voc,
    write_yolo,
)
from PIL import Image
from pycocotools.coco import COCO

from raygkd.data import Source, open_source

RNG = np.random.default_rng(7)
NAMES = ["cat", "dog", "owl"]
# sides of a box in VOC, which counts pixels from 1
SIDES = (("xmin", 1), ("ymin", 1), ("xmax", 0), ("ymax", 0))


def random_boxes(size: tuple[int, int] = (40, 30)) -> list[list[int]]:
    """Return up to four boxes of whole pixels inside an image."""
    corners = [np.sort(RNG.choice(side + 1, (2,), replace=False)) for side in size * 4]
    boxes = [[x[0], y[0], x[1], y[1]] for x, y in zip(corners[::2], corners[1::2])]
    return [[int(side) for side in box] for box in boxes[: RNG.integers(5)]] or [[1, 1, 9, 9]]


def objects(source: Source) -> dict[str, list[tuple]]:
    """Return split and file name -> class name and rounded sides of each box, sorted."""
    return {
        f"{sample.split} {Path(sample.origin).name}": sorted(
            (source.class_names[label], *np.round(sides, 2).tolist())
            for label, sides in zip(sample.boxes.label, sample.boxes.xyxy)
        )
        for sample in source.samples
    }


def test_imagefolder_like_torchvision(tmp_path):
    for split in ("train", "val"):
        for name in NAMES:
            for number in range(int(RNG.integers(1, 4))):
                write_image(tmp_path / split / name / "deep" / f"{number}.png")
    ours = open_source("imagefolder", tmp_path)
    for split in ("train", "val"):
        theirs = torchvision.datasets.ImageFolder(str(tmp_path / split))
        assert list(ours.class_names) == theirs.classes
        own = [(s.origin, s.label) for s in ours.samples if s.split == split]
        assert own == theirs.samples


def test_voc_like_torchvision(tmp_path):
    images = {
        f"{number:06}": [
            (NAMES[RNG.integers(3)], x0 + 1, y0 + 1, x1, y1) for x0, y0, x1, y1 in random_boxes()
        ]
        for number in range(9)
    }
    ids = list(images)
    lists = {"train": ids[:5], "val": ids[5:7], "test": ids[7:]}
    write_voc(tmp_path / "VOCdevkit" / "VOC2007", images, lists)
    expected = {}
    for split in lists:
        theirs = torchvision.datasets.VOCDetection(str(tmp_path), "2007", split)
        for path, (_, tree) in zip(theirs.images, theirs):
            expected[f"{split} {Path(path).name}"] = sorted(
                (entry["name"], *(float(entry["bndbox"][side]) - less for side, less in SIDES))
                for entry in tree["annotation"]["object"]
            )
    assert objects(open_source("voc", tmp_path / "VOCdevkit" / "VOC2007")) == expected


@pytest.mark.parametrize("is_text", [False, True])
def test_coco_like_pycocotools(tmp_path, is_text):
    expected, classes = {}, None
    for first, split in ((1, "train"), (50, "valid"), (90, "test")):
        images = {
            f"{split}{number}.jpg": [
                (int(RNG.choice([3, 7, 9])), x0, y0, x1 - x0, y1 - y0)
                for x0, y0, x1, y1 in random_boxes()
            ]
            for number in range(5)
        }
        contents = coco_contents(images, dict(zip((3, 7, 9), NAMES)), first_id=first)
        if is_text:
            for entry in (*contents["images"], *contents["annotations"]):
                key = "image_id" if "image_id" in entry else "id"
                entry[key] = f"img-{entry[key]}"
        path = tmp_path / split / "_annotations.coco.json"
        write_coco(path, path.parent, contents)
        with contextlib.redirect_stdout(io.StringIO()):
            theirs = COCO(str(path))
        classes = [entry["name"] for entry in theirs.loadCats(theirs.getCatIds())]
        for key, image in theirs.imgs.items():
            name = {"valid": "val"}.get(split, split)
            expected[f"{name} {image['file_name']}"] = sorted(
                (theirs.cats[box["category_id"]]["name"], *map(float, corners(box["bbox"])))
                for box in theirs.imgToAnns[key]
            )
    ours = open_source("coco", tmp_path)
    assert list(ours.class_names) == classes
    assert objects(ours) == expected


def corners(box: list[float]) -> tuple[float, ...]:
    x, y, width, height = box
    return x, y, x + width, y + height


def defined_by_ultralytics(root: Path) -> Iterator[tuple[str, list[tuple]]]:
    """Yield split and file name, and boxes, by the definition of the format, written out."""
    spec = yaml.safe_load((root / "data.yaml").read_text())
    for split in ("train", "val", "test"):
        for image in sorted((root / spec[split]).glob("*.jpg")):
            label = Path(str(image).replace("/images/", "/labels/")).with_suffix(".txt")
            lines = label.read_text().splitlines() if label.exists() else []
            width, height = Image.open(image).size
            found = []
            for number, *values in (map(float, line.split()) for line in lines):
                if len(values) > 4:
                    points = np.array(values).reshape(-1, 2)
                    (x0, y0), (x1, y1) = points.min(0), points.max(0)
                else:
                    x, y, w, h = values
                    x0, y0, x1, y1 = x - w / 2, y - h / 2, x + w / 2, y + h / 2
                sides = np.array([x0 * width, y0 * height, x1 * width, y1 * height])
                found.append((spec["names"][int(number)], *sides.astype(np.float32).round(2)))
            yield f"{split} {image.name}", sorted(found)


def yolo_line(box: list[int]) -> str:
    x0, y0, x1, y1 = np.array(box) / [40, 30, 40, 30]
    label = RNG.integers(3)
    if RNG.random() < 0.5:
        return f"{label} {x0:.6f} {y0:.6f} {x1:.6f} {y0:.6f} {x1:.6f} {y1:.6f}"
    return f"{label} {(x0 + x1) / 2:.6f} {(y0 + y1) / 2:.6f} {x1 - x0:.6f} {y1 - y0:.6f}"


def test_yolo_like_its_definition(tmp_path):
    splits = {
        split: {
            f"{split}{number}": None if number == 4 else "\n".join(map(yolo_line, random_boxes()))
            for number in range(6)
        }
        for split in ("train", "val", "test")
    }
    root = write_yolo(tmp_path, splits, NAMES)
    ours = objects(open_source("yolo", root))
    theirs = dict(defined_by_ultralytics(root))
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert [box[0] for box in ours[name]] == [box[0] for box in expected]
        for own, other in zip(ours[name], expected):
            assert np.allclose(own[1:], other[1:], atol=0.011)


def test_csv_like_pandas(tmp_path):
    header = ["image", "label", "split"]
    rows = [[f"{n}.png", NAMES[n % 3], ("train", "val", "test")[n // 3 % 3]] for n in range(18)]
    root = write_table(tmp_path / "labels.csv", [header, *rows])
    ours = open_source("csv", root)
    theirs = pd.read_csv(root / "labels.csv")
    assert list(ours.class_names) == sorted(theirs["label"].unique())
    own = [[Path(s.origin).name, ours.class_names[s.label], s.split] for s in ours.samples]
    assert own == theirs.to_numpy().tolist()


def test_webdataset_like_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    path = write_tar(tmp_path / "set" / "train-0.tar", tar_members("2", "0", "1", "0"))
    theirs = datasets.load_dataset("webdataset", data_files=[str(path)], split="train")
    theirs = theirs.cast_column("png", datasets.Image(decode=False))
    ours = open_source("webdataset", path.parent)
    own = [(s.read(), ours.class_names[s.label]) for s in ours.samples]
    assert own == [(row["png"]["bytes"], str(row["cls"])) for row in theirs]
