"""Tables of images without labels, beside labelled ones."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING

import numpy as np

from raygkd.data.splits import NO_LABEL
from raygkd.errors import DataError
from raygkd.registry import entry_name
from raygkd.storage.atomic_files import is_remote, local_path

if TYPE_CHECKING:
    from raygkd.data.parquet import ImageTable

UNLABELLED = "unlabelled"


def lacks_labels(dataset: str) -> bool:
    """Return whether no image of a data set has a label, by its name in ``--dataset``."""
    return entry_name(dataset) == UNLABELLED


def check_exists(path: str) -> None:
    """Refuse a place of images without labels that does not exist.

    Raises:
        DataError: there is no such file or folder on this machine.
    """
    if not is_remote(path) and not (path and local_path(path).exists()):
        raise DataError(f"--unlabelled {path!r}: no such file or folder; pass one with images")


def check_folder(path: str) -> None:
    """Refuse a file that is not Parquet as images without labels.

    Raises:
        DataError: it is not a folder.
    """
    if not is_remote(path) and not local_path(path).is_dir():
        raise DataError(f"--unlabelled {path!r}: must be a folder with images, or Parquet")


def without_labels(table: ImageTable) -> ImageTable:
    """Return a table whose labels or boxes, if it has any, are left out."""
    none = np.full(len(table), NO_LABEL, np.int64)
    return dataclasses.replace(table, class_names=(), labels=none, boxes=None)


def joined(labelled: ImageTable, unlabelled: ImageTable) -> ImageTable:
    """Return one table of the rows of two, the labelled ones first, with the classes of the first.

    Raises:
        DataError: the first has boxes, or the two are not in the same kind of store.
    """
    if labelled.boxes is not None:
        raise DataError(
            f"--unlabelled: '{labelled.path}' has boxes; images without labels serve classifiers "
            "only; omit the option"
        )
    stores = [
        one.path.partition("://")[0] if is_remote(one.path) else ""
        for one in (labelled, unlabelled)
    ]
    if stores[0] != stores[1]:
        raise DataError(
            f"'{labelled.path}' and '{unlabelled.path}' are in different stores; put the images "
            "with and without labels into the same one"
        )
    first, second = labelled.units, unlabelled.units
    hashes = labelled.content_hash + unlabelled.content_hash
    return dataclasses.replace(
        labelled,
        labels=np.concatenate([labelled.labels, unlabelled.labels]),
        splits=np.concatenate([labelled.splits, unlabelled.splits]),
        units=dataclasses.replace(
            first,
            file=np.concatenate([first.file, second.file + len(labelled.files)]),
            row_group=np.concatenate([first.row_group, second.row_group]),
            first=np.concatenate([first.first, second.first + len(labelled)]),
            rows=np.concatenate([first.rows, second.rows]),
        ),
        files=(*labelled.files, *unlabelled.files),
        size_bytes=labelled.size_bytes + unlabelled.size_bytes,
        content_hash=hashlib.sha256(hashes.encode()).hexdigest(),
        warnings=(*labelled.warnings, *unlabelled.warnings),
    )
