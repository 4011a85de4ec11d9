"""Each format of images, from ``data prepare`` over a search to ``evaluate``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from layouts import (
    coco_contents,
    encode_image,
    tar_members,
    write_coco,
    write_image,
    write_table,
    write_tar,
    write_voc,
    write_yolo,
)
from outcomes import Ran

from raygkd.data import SPLITS

pytestmark = pytest.mark.slow

CLASSES = ("cat", "dog")
OF_SPLIT = {"train": 32, "val": 16, "test": 16}
BOX = (10, 8, 30, 24)
DETECTORS = (
    *("--teacher", "fasterrcnn_resnet18_fpn32", "--student", "fcos_mobilenet_v3_small_fpn32"),
    *("--teacher-weights", "none", "--student-weights", "none", "--image-size", "64"),
)
CLASSIFIERS = ("--teacher", "resnet14", "--student", "resnet8", "--image-size", "32")


def names(split: str) -> list[str]:
    """Return the names of the images of a split, without a suffix."""
    return [f"{split}{number:02}" for number in range(OF_SPLIT[split])]


def labels(split: str) -> list[str]:
    """Return the classes of the images of a split."""
    return [CLASSES[number % 2] for number in range(OF_SPLIT[split])]


def imagefolder(root: Path) -> None:
    """Write a folder of each class in one of each split."""
    for split in SPLITS:
        for name, label in zip(names(split), labels(split), strict=True):
            write_image(root / split / label / f"{name}.png")


def csv(root: Path) -> None:
    """Write a table of labels."""
    rows = [
        (f"{name}.png", label, split)
        for split in SPLITS
        for name, label in zip(names(split), labels(split), strict=True)
    ]
    write_table(root / "labels.csv", [("image", "label", "split"), *rows])


def boxes_in_tsv(root: Path) -> None:
    """Write a table of boxes."""
    rows = [
        (f"{name}.png", label, *BOX, split)
        for split in SPLITS
        for name, label in zip(names(split), labels(split), strict=True)
    ]
    header = ("image", "label", "xmin", "ymin", "xmax", "ymax", "split")
    write_table(root / "boxes.tsv", [header, *rows])


def webdataset(root: Path) -> None:
    """Write tar files, one for each split."""
    for number, split in enumerate(SPLITS):
        write_tar(root / f"{split}-000.tar", tar_members(*labels(split), first=100 * number))


def hf(root: Path) -> None:
    """Write what ``save_to_disk`` of the package datasets does."""
    kinds = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    )
    of_split = {
        split: datasets.Dataset.from_dict(
            {
                "image": [
                    {"bytes": encode_image(100 * number + row), "path": None}
                    for row in range(OF_SPLIT[split])
                ],
                "label": labels(split),
            },
            features=kinds,
        )
        for number, split in enumerate(SPLITS)
    }
    datasets.DatasetDict(of_split).save_to_disk(str(root))


def voc(root: Path) -> None:
    """Write annotations in XML, and lists of the splits."""
    write_voc(
        root,
        {
            name: [(label, *BOX)]
            for split in SPLITS
            for name, label in zip(names(split), labels(split), strict=True)
        },
        {split: names(split) for split in SPLITS},
    )


def coco(root: Path) -> None:
    """Write an instances file for each split."""
    (left, top, right, bottom), ids = BOX, {name: key for key, name in enumerate(CLASSES, 1)}
    for split in SPLITS:
        images = {
            f"{name}.jpg": [(ids[label], left, top, right - left, bottom - top)]
            for name, label in zip(names(split), labels(split), strict=True)
        }
        contents = coco_contents(images, {key: name for name, key in ids.items()})
        folder = root / f"{split}2017"
        write_coco(root / "annotations" / f"instances_{split}2017.json", folder, contents)


def yolo(root: Path) -> None:
    """Write images, label files and a data.yaml."""
    splits = {
        split: {
            name: f"{CLASSES.index(label)} 0.5 0.5 0.5 0.5\n"
            for name, label in zip(names(split), labels(split), strict=True)
        }
        for split in SPLITS
    }
    write_yolo(root, splits, CLASSES)


@pytest.mark.parametrize(
    ("dataset", "write", "models"),
    [
        ("imagefolder", imagefolder, CLASSIFIERS),
        ("csv", csv, CLASSIFIERS),
        ("webdataset", webdataset, CLASSIFIERS),
        ("hf", hf, CLASSIFIERS),
        ("csv", boxes_in_tsv, DETECTORS),
        ("voc", voc, DETECTORS),
        ("coco", coco, DETECTORS),
        ("yolo", yolo, DETECTORS),
    ],
)
def test_a_folder_is_recognised_prepared_searched_on_and_scored(
    dataset: str,
    write: Callable[[Path], None],
    models: tuple[str, ...],
    raygkd: Callable[..., Ran],
    tmp_path: Path,
) -> None:
    folder, shards, output = (tmp_path / name for name in ("images", "shards", "output"))
    write(folder)

    def run(*arguments: str | Path) -> dict:
        ran = raygkd(*arguments, "--json")
        assert ran.code == 0, ran.err
        return json.loads(ran.out)

    info = run("data", "info", folder)
    assert info["dataset"].startswith(dataset)
    run("data", "prepare", "--data-dir", folder, "--output", shards)
    for known in (info, run("data", "info", shards)):
        assert known["splits"] == OF_SPLIT
        assert list(known["classes"]) == list(CLASSES)
    # the data set is recognised
    given = ("--data-dir", folder, "--trials", "1", "--epochs", "1", "--teacher-epochs", "1")
    found = run("tune", *given, *models, "--batch-size", "8", "--output", output, "--name", "one")
    score = found[found["champion"]["role"]]["test_score"]
    assert np.isfinite(score)
    scored = run("evaluate", output / "runs" / "tune-one", "--output", output)
    [of_run] = scored["models"].values()
    assert of_run["scores"]["score"] == pytest.approx(score, abs=1e-6)
