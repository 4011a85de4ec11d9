"""Memory and speed of a run on many images without labels.

python tests/benchmarks/many_unlabelled.py FOLDER [--images 50000] [--cache-mb 0]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]
import timm
import torch

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
    command = [
        *(sys.executable, "-m", "raygkd", "train", "--unlabelled", str(photos)),
        *("--teacher", "timm:test_resnet", "--teacher-weights", str(weights)),
        *("--teacher-image-size", "32", "--student", "resnet8", "--epochs", "1"),
        *("--batch-size", "256", "--cache-mb", given.cache_mb, "--json"),
        *("--output", str(given.folder / f"output-{given.cache_mb}")),
    ]
    started, peak = time.monotonic(), [0]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def watch() -> None:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            held = 0
            for one in [root, *root.children(recursive=True)]:
                try:
                    memory = one.memory_full_info()
                    held += memory.uss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            peak[0] = max(peak[0], held)
            time.sleep(1.0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    out = process.communicate()[0]
    watcher.join()
    if process.returncode:
        sys.exit(process.returncode)
    found = json.loads(out)
    epoch = json.loads(Path(found["run"], "metrics.jsonl").read_text())
    row = {
        "images": given.images,
        "cache_mb": int(given.cache_mb),
        "peak_mib": round(peak[0] / 2**20),
        "seconds": round(time.monotonic() - started),
        "images_per_second": round(epoch["images_per_second"]),
        "cka": round(found["val_score"], 4),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
