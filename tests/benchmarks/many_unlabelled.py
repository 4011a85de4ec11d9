"""Memory and speed of a run on many images without labels.

python tests/benchmarks/many_unlabelled.py FOLDER [--images 50000] [--cache-mb 0]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from watched_command import watched

from raygkd.data.sklearn_digits import load_digits
from raygkd.data.sources import encode_png


def write(root: Path, images: int) -> None:
    """Write digits of 32 x 32 pixels among noise, a thousand to a folder."""
    digits = load_digits().images_BHW
    rng = np.random.default_rng(0)
    for number in range(images):
        folder = root / f"{number // 1000:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        image_HW = rng.integers(0, 64, (32, 32), dtype=np.uint8)
        top, left = rng.integers(0, 16, 2)
        image_HW[top : top + 16, left : left + 16] += np.kron(
            digits[number % len(digits)] // 2, np.ones((2, 2), np.uint8)
        )
        (folder / f"{number}.png").write_bytes(encode_png(image_HW))


def main() -> None:
    """Write the images, train, and print a line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--cache-mb", default="0")
    given = parser.parse_args()
    photos = given.folder / "photos"
    if not photos.exists():
        write(photos, given.images)
    torch.manual_seed(0)
    weights = given.folder / "teacher.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), weights)
    ended = watched(
        *("train", "--unlabelled", str(photos)),
        *("--teacher", "timm:test_resnet", "--teacher-weights", str(weights)),
        *("--teacher-image-size", "32", "--student", "resnet8", "--epochs", "1"),
        *("--batch-size", "256", "--cache-mb", given.cache_mb, "--json"),
        *("--output", str(given.folder / f"output-{given.cache_mb}")),
    )
    if ended.code:
        sys.exit(ended.code)
    found = json.loads(ended.out)
    epoch = json.loads(Path(found["run"], "metrics.jsonl").read_text())
    row = {
        "images": given.images,
        "cache_mb": int(given.cache_mb),
        "peak_mib": ended.peak_mib,
        "seconds": round(ended.seconds),
        "images_per_second": round(epoch["images_per_second"]),
        "cka": round(found["val_score"], 4),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
