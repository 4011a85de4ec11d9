"""The data sets that can be turned into Parquet shards: their images, labels and splits."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raygkd.data.seeds import generator
from raygkd.data.splits import choose
from raygkd.errors import ConfigError, DataError
from raygkd.registry import Registry

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm",
)  # fmt: skip
SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
DIGITS_TEST_FRACTION = 0.2
DIGITS_SEED = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One labelled image that is not read yet.

    Attributes:
        label: position in the class names.
        split: "train", "val" or "test".
        origin: the file's path, or the data set and its index; shown in errors.
        read: returns the encoded image (PNG, JPEG...); OSError where the file cannot be read.
    """

    label: int
    split: str
    origin: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Source:
    """A data set: its name, its class names, and its images in any order."""

    name: str
    class_names: tuple[str, ...]
    samples: Sequence[Sample]


Opener = Callable[[Path | None, bool], Source]
SOURCES: Registry[Opener] = Registry("dataset")


def open_source(name: str, data_dir: str | Path | None = None, download: bool = False) -> Source:
    """Return a data set whose images are read later, one by one.

    Args:
        name: one of ``SOURCES``: digits, cifar10, cifar100, imagefolder.
        data_dir: folder that holds the files; the digits need none.
        download: fetch the files of cifar10 or cifar100 into ``data_dir`` when they are missing.

    Raises:
        ConfigError: an unknown name, or a folder that is needed and not given.
        DataError: the folder does not hold what the data set needs.
    """
    return SOURCES.get(name)(Path(data_dir).expanduser() if data_dir else None, download)


@SOURCES.register("digits")
def _digits(data_dir: Path | None, download: bool) -> Source:
    """Handwritten digits, 8x8 grey (Alpaydin and Kaynak 1998); a fifth of them is the test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images_BHW = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    test = choose(
        np.arange(len(images_BHW)),
        digits.target,
        round(DIGITS_TEST_FRACTION * len(images_BHW)),
        rng=generator(DIGITS_SEED),
    )
    splits = np.full(len(images_BHW), "train", dtype=object)
    splits[test] = "test"
    samples = [
        _array_sample(image_HW, int(label), split, f"digits {index}")
        for index, (image_HW, label, split) in enumerate(zip(images_BHW, digits.target, splits))
    ]
    return Source("digits", tuple(str(name) for name in digits.target_names), samples)


@SOURCES.register("cifar10")
def _cifar10(data_dir: Path | None, download: bool) -> Source:
    from torchvision.datasets import CIFAR10

    return _cifar("cifar10", CIFAR10, data_dir, download)


@SOURCES.register("cifar100")
def _cifar100(data_dir: Path | None, download: bool) -> Source:
    from torchvision.datasets import CIFAR100

    return _cifar("cifar100", CIFAR100, data_dir, download)


def _cifar(name: str, loader: Any, data_dir: Path | None, download: bool) -> Source:
    """Photographs of 32x32 pixels (Krizhevsky 2009), with the test split they come with."""
    root = _given(name, data_dir)
    samples: list[Sample] = []
    for split in ("train", "test"):
        try:
            data = loader(root, train=split == "train", download=download)
        except (OSError, RuntimeError) as error:
            if download:
                raise DataError(f"{name} cannot be downloaded into '{root}': {error}") from error
            raise DataError(
                f"no complete {loader.base_folder} in '{root}': give the folder that holds it as "
                "--data-dir, or fetch it with --download"
            ) from error
        samples += (
            _array_sample(image_HWC, label, split, f"{name} {split} {index}")
            for index, (image_HWC, label) in enumerate(zip(data.data, data.targets, strict=True))
        )
    return Source(name, tuple(data.classes), samples)


@SOURCES.register("imagefolder")
def _imagefolder(data_dir: Path | None, download: bool) -> Source:
    """Any tree of a folder per class, with or without folders train, val and test above them."""
    root = _given("imagefolder", data_dir)
    if not root.is_dir():
        raise DataError(f"no folder '{root}': give an existing one as --data-dir")
    labels: dict[str, int] = {}
    samples: list[Sample] = []
    for split, parent in _split_folders(root).items():
        files = {folder.name: _image_files(folder) for folder in _class_folders(parent)}
        if split == "train":
            labels = {name: label for label, name in enumerate(files)}
        _check_tree(parent, files, labels)
        samples += (
            Sample(labels[name], split, str(path), path.read_bytes)
            for name, paths in files.items()
            for path in paths
        )
    return Source("imagefolder", tuple(labels), samples)


def _given(name: str, data_dir: Path | None) -> Path:
    if data_dir is None:
        raise ConfigError(f"--dataset {name} needs --data-dir, the folder with its files")
    return data_dir


def _array_sample(pixels: NDArray[np.uint8], label: int, split: str, origin: str) -> Sample:
    return Sample(label, split, origin, partial(_encode_png, pixels))


def _encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode grey (H, W) or colour (H, W, 3) pixels."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _class_folders(parent: Path) -> list[Path]:
    folders = (path for path in parent.iterdir() if path.is_dir() and path.name[0] != ".")
    return sorted(folders, key=lambda folder: folder.name)


def _split_folders(root: Path) -> dict[str, Path]:
    """Return split -> folder; "train" -> ``root`` itself where the tree has no split folders."""
    # a folder "train" without folders in it is a class of that name
    if not (root / "train").is_dir() or not _class_folders(root / "train"):
        return {"train": root}
    found = {}
    for split, names in SPLIT_FOLDERS.items():
        folders = [root / name for name in names if (root / name).is_dir()]
        if len(folders) > 1:
            both = " and ".join(f"'{folder}'" for folder in folders)
            raise DataError(f"{both} are the same split: keep one of them")
        if folders:
            found[split] = folders[0]
    return found


def _image_files(folder: Path) -> list[Path]:
    paths = []
    for parent, folders, names in os.walk(folder):
        folders[:] = (name for name in folders if name[0] != ".")
        images = (n for n in names if n[0] != "." and n.lower().endswith(IMAGE_SUFFIXES))
        paths += [Path(parent, name) for name in images]
    return sorted(paths)


def _check_tree(parent: Path, files: dict[str, list[Path]], labels: dict[str, int]) -> None:
    suffixes = "known suffixes: " + " ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
    if not files:
        raise DataError(f"no class folders in '{parent}': put each class's images in a folder")
    if not any(files.values()):
        raise DataError(f"no images in the class folders of '{parent}' ({suffixes})")
    for name, paths in files.items():
        if not paths:
            raise DataError(
                f"class '{name}' has no images in '{parent / name}' ({suffixes}): add some or "
                "remove the folder"
            )
        if name not in labels:
            raise DataError(
                f"class '{name}' of '{parent}' is not among the training classes: add it to the "
                "train folder or remove it"
            )
