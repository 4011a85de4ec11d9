"""What a command leaves, and the images it is given."""

from __future__ import annotations

import io
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

ROWS, CLASSES = 60, 3
# how the lines that tell of work begin
# what is no error: progress, and what is said of the images
PROGRESS = (
    *(
        "preparing images: ",
        "decoding images: ",
        "writing onnx: ",
        "calibrating: ",
        "warning: found ",
    ),
    "removed what killed processes left",
)


@dataclass(frozen=True)
class Ran:
    """What a command gave back."""

    code: int
    out: str
    err: str


def files(*folders: Path) -> set[Path]:
    """Return all files and folders below folders."""
    return {path for folder in folders for path in folder.rglob("*")}


def mlflow_runs(store: Path) -> int:
    """Return how many runs an MLflow store holds."""
    with closing(sqlite3.connect(store)) as database:
        return database.execute("SELECT count(*) FROM runs").fetchone()[0]


def png(seed: int, side: int = 12) -> bytes:
    """Return an encoded image of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
