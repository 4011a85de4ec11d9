"""Which data set a folder or file is, if none is chosen."""

from __future__ import annotations

from pathlib import Path

from raygkd.errors import ConfigError, DataError
from raygkd.registry import DATASETS
from raygkd.storage.atomic_files import is_remote

AUTO = "auto"
PARQUET = "parquet"


def holds_parquet(path: str) -> bool:
    """Return whether a path is a URL, missing, a Parquet file or a folder of such files."""
    root = Path(path).expanduser()
    if is_remote(path) or not root.exists() or root.suffix == ".parquet":
        return True
    return root.is_dir() and any(root.glob("*.parquet"))


def recognise(data_dir: str | None) -> tuple[str, str]:
    """Return the name of the data set that a folder or file is, and what shows it.

    Args:
        data_dir: path of the folder or file; URLs are Parquet shards.

    Raises:
        ConfigError: no folder is given.
        DataError: the folder does not exist, it is none of the data sets, or it may be several.
    """
    if data_dir is None:
        raise ConfigError("--dataset auto needs --data-dir, the folder to look at")
    if is_remote(data_dir):
        return PARQUET, "a URL"
    root = Path(data_dir).expanduser()
    if not root.exists():
        raise DataError(f"no file or folder '{root}': set --data-dir to an existing one")
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
        raise DataError(f"'{root}' may be {each}: choose one with --dataset")
    if not found:
        raise DataError(
            f"'{root}' is none of the known data sets ({', '.join((*DATASETS.names(), PARQUET))}): "
            "expected folders of images by class, or images with annotations (see README)"
        )
    [(name, seen)] = found.items()
    return name, seen
