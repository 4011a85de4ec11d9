"""Images per second of one run on one node and on two, with one CPU each.

    PYTHONPATH=tests:tests/rayrun python tests/benchmarks/scaling.py cifar10.parquet

The nodes are processes of this machine, in networks of their own where that is allowed; runs of one
worker and of two take turns.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from nodes import Nodes, environment_of, network
from records import json_lines
from servers import Server

TURNS = 3
# the first has the check of the loss terms in it
EPOCHS = 4
# few are scored: only training is timed
IMAGES = {"train": 2500, "test": 100}
TRAIN = (
    *("train", "--dataset", "parquet", "--epochs", str(EPOCHS), "--val-fraction", "0.04"),
    *("--teacher", "resnet56", "--teacher-epochs", "1", "--student", "resnet20"),
    *("--batch-size", "128", "--cpus-per-worker", "1"),
)


def new_folder(stack: contextlib.ExitStack) -> Callable[[str], Path]:
    """Return what makes folders that end with a stack."""
    root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="s")))

    def folder(name: str) -> Path:
        path = root / f"{name}{len(list(root.iterdir()))}"
        path.mkdir()
        return path

    return folder


def part_of(data: Path, folder: Path) -> Path:
    """Write the first images of each split of a Parquet file to another one."""
    images = pq.read_table(data)
    splits = [images.filter(pc.equal(images["split"], split))[:n] for split, n in IMAGES.items()]
    pq.write_table(pa.concat_tables(splits), folder / "images.parquet")
    return folder / "images.parquet"


def main(data: Path) -> None:
    """Print images per second of every run, and the efficiency of two workers."""
    found: dict[int, list[float]] = {1: [], 2: []}
    with contextlib.ExitStack() as stack:
        folder = new_folder(stack)
        place = stack.enter_context(network(2))
        server = Server(folder("server"), place.outside)
        stack.callback(server.kill)
        server.start()
        server.wait()
        nodes = Nodes(place, folder, {}, stack)
        nodes.add()
        output, images = folder("output"), part_of(data, folder("images"))
        for turn in range(TURNS):
            for workers, speeds in found.items():
                name = f"{workers}-{turn}"
                command = [sys.executable, "-m", "raygkd", "submit", "--", *TRAIN, "--name", name]
                command += ["--data-dir", str(images), "--output", str(output)]
                command += ["--tracking-uri", server.uri, "--workers", str(workers)]
                subprocess.run(command, env=environment_of(nodes.client), check=True)
                lines = json_lines(output / "runs" / f"train-{name}" / "metrics.jsonl")
                found_now = [line["images_per_second"] for line in lines[1:]]
                print(f"{workers} node(s): {[round(speed) for speed in found_now]} images/s")
                speeds += found_now
    one, two = (statistics.median(speeds) for speeds in found.values())
    print(
        f"1 node: {one:.0f} images/s; 2 nodes: {two:.0f} images/s; efficiency {two / one / 2:.0%}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
