from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from layouts import encode_image

from raygkd.data import Sample, Source
from raygkd.data.parquet import ImageTable, open_table
from raygkd.data.prepare import prepare

torch.set_num_threads(1)

CLASS_NAMES = ("ant", "bee", "cat")


def make_source(
    images: int, *, splits: tuple[str, ...] = ("train",), broken: tuple[int, ...] = ()
) -> Source:
    """Return images of three classes in turn; the split changes every three images."""
    samples = [
        Sample(
            index % 3,
            splits[index // 3 % len(splits)],
            f"image {index}",
            partial(bytes, b"not an image" if index in broken else encode_image(index)),
        )
        for index in range(images)
    ]
    return Source("toy", CLASS_NAMES, samples)


@pytest.fixture(name="encode_image")
def _encode_image() -> Callable[..., bytes]:
    return encode_image


@pytest.fixture(name="make_source")
def _make_source() -> Callable[..., Source]:
    return make_source


@pytest.fixture
def make_table(tmp_path: Path) -> Callable[..., ImageTable]:
    def make(images: int, **options: object) -> ImageTable:
        destination = tmp_path / f"table-{len(list(tmp_path.iterdir()))}"
        prepare(make_source(images, **options), str(destination))
        return open_table(str(destination))

    return make


@pytest.fixture
def broken_table(tmp_path: Path) -> Callable[..., ImageTable]:
    """Return a function that opens a foreign file some of whose images are cut off."""

    def make(images: int, broken: Iterable[int], splits: list[str] | None = None) -> ImageTable:
        encoded = [encode_image(index) for index in range(images)]
        for row in broken:
            encoded[row] = encoded[row][:40]
        columns = {"image": encoded, "label": np.arange(images) % 3}
        if splits is not None:
            columns["split"] = splits
        pq.write_table(pa.table(columns), tmp_path / "broken.parquet")
        return open_table(str(tmp_path / "broken.parquet"))

    return make


@pytest.fixture
def make_tree(tmp_path: Path) -> Callable[[dict[str, int]], Path]:
    """Return a function that makes folders, each with a number of PNG images, all different."""

    def make(folders: dict[str, int]) -> Path:
        root, seeds = tmp_path / "photos", itertools.count()
        for folder, images in folders.items():
            (root / folder).mkdir(parents=True, exist_ok=True)
            for index in range(images):
                (root / folder / f"{index}.png").write_bytes(encode_image(next(seeds)))
        return root

    return make
