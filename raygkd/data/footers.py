"""The footers of Parquet files: what raygkd and other programs write there of the images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raygkd.errors import DataError, brief
from raygkd.storage.reading import parse_json

FORMAT_VERSION = 1
METADATA_KEY = b"raygkd"
TOTAL_KEY = b"raygkd.images"
FOREIGN_CLASSES_KEY = b"classes"


def own_metadata(footer: Mapping[bytes, bytes], path: str) -> dict[str, Any] | None:
    """Return what raygkd wrote into a file; None for a file of another program.

    Raises:
        DataError: it is damaged, or of another version.
    """
    if METADATA_KEY not in footer:
        return None
    try:
        facts = parse_json(footer[METADATA_KEY])
        known = {"version": int, "dataset": str, "classes": list}
        is_whole = all(isinstance(facts[key], kind) for key, kind in known.items())
        is_whole = is_whole and _are_names(facts["classes"])
        is_whole = is_whole and isinstance(facts.get("warnings", []), list)
        is_whole = is_whole and all(isinstance(one, str) for one in facts.get("warnings", []))
    except (ValueError, RecursionError, KeyError, TypeError):
        is_whole = False
    if not is_whole:
        raise DataError(f"'{path}' has damaged metadata; prepare the data again")
    if facts["version"] != FORMAT_VERSION:
        raise DataError(
            f"'{path}' has format version {facts['version']}, but this version of raygkd reads "
            f"{FORMAT_VERSION}; prepare the data again, or use the version that wrote it"
        )
    return facts


def foreign_class_names(footer: Mapping[bytes, bytes], path: str) -> list[str] | None:
    """Return the class names that another program wrote into a file; None without them.

    Raises:
        DataError: they are not UTF-8, empty or repeated.
    """
    if FOREIGN_CLASSES_KEY not in footer:
        return None
    try:
        text = footer[FOREIGN_CLASSES_KEY].decode()
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}': the metadata 'classes' is not UTF-8: {error}") from error
    names = [name.strip() for name in text.split(",")]
    if not _are_names(names):
        raise DataError(
            f"'{path}': the metadata 'classes' {brief(text)} must be different names, none of them "
            "empty"
        )
    return names


def _are_names(names: list[Any]) -> bool:
    """Return whether names are those of different classes."""
    are_texts = all(isinstance(name, str) and name.strip() for name in names)
    return are_texts and len(set(names)) == len(names)


def total_of(footer: Mapping[bytes, bytes], path: str) -> int | None:
    """Return the number of images in all shards that a footer states; None without one."""
    text = footer.get(TOTAL_KEY)
    if text is not None and not text.isdigit():
        raise DataError(f"'{path}' has damaged metadata; prepare the data again")
    return None if text is None else int(text)
