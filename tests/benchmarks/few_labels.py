"""What images without labels add to few labels, on the digits.

A teacher that knows all labels stands for a model that was trained elsewhere. The student has a
label of some of the training images, and the others without: alone it learns from the labels, in as
many steps as with its teacher. All commands are run as a person would.

    python tests/benchmarks/few_labels.py FOLDER [--labels 20,50,200] [--seeds 3] [--epochs 20]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raygkd.data.footers import FOREIGN_CLASSES_KEY
from raygkd.data.sklearn_digits import load_digits
from raygkd.data.sources import encode_png
from raygkd.data.splits import choose

METHODS = ("none", "graph", "graph+kd")


def write(path: Path, labels: int | None, seed: int) -> None:
    """Write the digits with so many labels of training images, or all; the rest have none."""
    digits = load_digits()
    rng = np.random.default_rng(seed)
    train = np.flatnonzero(~digits.is_test)
    label = digits.label.copy()
    split = np.where(digits.is_test, "test", "train").astype(object)
    val = choose(train, digits.label, 150, rng=np.random.default_rng(0))
    split[val] = "val"
    if labels is not None:
        train = np.setdiff1d(train, val)
        kept = choose(train, digits.label, labels, rng=rng, floor=1)
        label[np.setdiff1d(train, kept)] = -1
    table = pa.table(
        {
            "image": [encode_png(image_HW) for image_HW in digits.images_BHW],
            "label": label,
            "split": split.tolist(),
        }
    )
    names = {FOREIGN_CLASSES_KEY: ",".join("0123456789")}
    pq.write_table(table.replace_schema_metadata(names), path, row_group_size=256)


def raygkd(*arguments: str) -> dict:
    """Run a command; return its result."""
    ran = subprocess.run(
        [sys.executable, "-m", "raygkd", *arguments, "--json"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(ran.stdout)


def main() -> None:
    """Train and print a line of JSON for each student."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--labels", default="20,50,200")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", default="20")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    output = ("--output", str(given.folder / "output"))
    whole = given.folder / "whole.parquet"
    write(whole, None, 0)
    data = ("--dataset", "parquet", "--augment", "crop")
    named = ("--teacher", "resnet20", "--epochs", "20", *output)
    teacher = raygkd("teacher", *data, "--data-dir", str(whole), *named)
    for labels in map(int, given.labels.split(",")):
        for seed in range(given.seeds):
            path = given.folder / f"{labels}-{seed}.parquet"
            write(path, labels, seed)
            for method in METHODS:
                found = raygkd(
                    *("train", *data, "--data-dir", str(path), "--method", method),
                    *("--teacher", teacher["model"], "--student", "resnet8"),
                    *("--epochs", given.epochs, "--seed", str(seed), *output),
                )
                row = {
                    "labels": labels,
                    "seed": seed,
                    "method": method,
                    "accuracy": found["models"]["student"]["test_score"],
                    "seconds": found["seconds"],
                }
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
