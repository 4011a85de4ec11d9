"""Memory and speed of preparing a folder of very many small images, beside a plain copy of it.

    python tests/benchmarks/many_images.py FOLDER [--images 1000000]

Prints a line of JSON each for the copy, for ``raygkd data prepare`` (with ``--kill`` killed after
so many seconds, and run again), and for ``raygkd data info`` on the shards and on the folder.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from watched_command import watched

CLASSES, TEMPLATES, SIDE = 100, 500, 24


def write(root: Path, images: int) -> None:
    """Write JPEGs in a folder per class; a comment makes each different."""
    rng = np.random.default_rng(0)
    templates = []
    for _ in range(TEMPLATES):
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((SIDE, SIDE)).save(file, "JPEG")
        templates.append(file.getvalue())
    for label in range(CLASSES):
        (root / f"class{label:02d}").mkdir(parents=True)
    for number in range(images):
        text = f"{number:010d}".encode()
        comment = b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text
        image = templates[number % TEMPLATES]
        path = root / f"class{number % CLASSES:02d}" / f"{number}.jpg"
        path.write_bytes(image[:2] + comment + image[2:])


def main() -> None:
    """Write the images, and print the lines."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--kill", type=float, default=0.0, help="seconds; 0: not at all")
    given = parser.parse_args()
    photos, shards = given.folder / "photos", given.folder / "shards"
    if not photos.exists():
        write(photos, given.images)

    def told(what: str, seconds: float, **row: Any) -> None:
        rate = round(given.images / seconds)
        row = {"what": what, "images": given.images, "rate": rate, "seconds": seconds, **row}
        print(json.dumps(row), flush=True)

    def run(what: str, *arguments: str, kill_after: float = 0.0) -> None:
        ended = watched(*arguments, kill_after=kill_after)
        told(what, round(ended.seconds, 1), code=ended.code, peak_mib=ended.peak_mib)

    started = time.monotonic()
    shutil.copytree(photos, given.folder / "copy")
    told("copy", round(time.monotonic() - started, 1))
    shutil.rmtree(given.folder / "copy")
    prepare = ("data", "prepare", "--data-dir", str(photos), "--output", str(shards))
    if given.kill:
        run("killed", *prepare, kill_after=given.kill)
        incomplete = sorted(Path(f"{shards}.incomplete").glob("*.parquet"))
        before = {path.name: path.stat().st_mtime_ns for path in incomplete}
    run("prepare", *prepare)
    if given.kill:
        kept = [shards / name for name in before]
        unchanged = sum(path.stat().st_mtime_ns == before[path.name] for path in kept)
        print(json.dumps({"shards_before": len(kept), "unchanged": unchanged}))
    sheet = ("--sheet", str(given.folder / "sheet.png"))
    run("info of the shards", "data", "info", str(shards), *sheet)
    run("info of the folder", "data", "info", str(photos), *sheet)


if __name__ == "__main__":
    main()
