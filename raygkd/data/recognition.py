"""Which data set a folder or file is, if none is chosen."""

from __future__ import annotations

from raygkd.data.image_files import has_only_images
from raygkd.data.unlabelled import UNLABELLED
from raygkd.errors import ConfigError, DataError
from raygkd.registry import DATASETS
from raygkd.storage.atomic_files import is_remote, local_path

AUTO = "auto"
PARQUET = "parquet"


def holds_parquet(path: str) -> bool:
    """Return whether a path is a URL, missing, a Parquet file or a folder of such files."""
    root = local_path(path)
    if is_remote(path) or not root.exists() or root.suffix == ".parquet":
        return True
    return root.is_dir() and any(root.glob("*.parquet"))


def recognise(data_dir: str | None, *, allow_unlabelled: bool = False) -> tuple[str, str]:
    """Return the name of the data set that a folder or file is, and what shows it.

    Args:
        data_dir: path of the folder or file; URLs are Parquet shards.
        allow_unlabelled: whether a folder of images alone counts as images without labels.

    Raises:
        ConfigError: no folder is given.
        DataError: the folder does not exist, it is none of the data sets, or it may be several.
    """
    if data_dir is None:
        raise ConfigError("--dataset auto needs --data-dir, the folder of the data set")
    if is_remote(data_dir):
        return PARQUET, "a URL"
    root = local_path(data_dir)
    if not root.exists():
        raise DataError(f"no file or folder '{root}'; set --data-dir to an existing one")
    if holds_parquet(data_dir):
        return PARQUET, ".parquet files"
    found = {
        name: seen
        for name in DATASETS.names()
        if (seen := DATASETS.get(name).recognise(root)) is not None
    }
    special = {name: seen for name, seen in found.items() if not DATASETS.get(name).is_general}
    found = special or found
    if len(found) > 1:
        each = " or ".join(f"{name} ({seen})" for name, seen in found.items())
        raise DataError(f"'{root}' may be {each}; choose one with --dataset")
    if root.is_dir() and not any(root.iterdir()):
        raise DataError(f"'{root}' is empty; choose the folder of the images")
    if not found and has_only_images(root):
        if allow_unlabelled:
            return UNLABELLED, "only images"
        raise DataError(
            f"'{root}' contains only images, with no folders of classes: it looks unlabelled; "
            f"train without labels with --unlabelled {root}"
        )
    if not found:
        raise DataError(
            f"'{root}' is none of the known data sets ({', '.join((*DATASETS.names(), PARQUET))}): "
            "expected folders of images by class, or images with annotations (see "
            "docs/guides/images.md); images without labels are given as --unlabelled"
        )
    [(name, seen)] = found.items()
    return name, seen
