"""Image files below a folder, by suffix; other files are counted, not silently left out."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import features

from raygkd.data.faults import Fault, Faults
from raygkd.data.splits import split_named
from raygkd.errors import DataError
from raygkd.storage.reading import MIB, read_bytes

SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jpe",
    ".jfif",
)  # fmt: skip
# suffixes that only some installations of Pillow read
OPTIONAL_SUFFIXES = {"avif": (".avif",), "jpg_2000": (".jp2", ".j2k", ".jpf", ".jpx")}
HEIF_SUFFIXES = (".heic", ".heif")
HEIF_INSTALL = "pip install 'raygkd[heif]'"
MOST_IMAGE_BYTES = 1024 * MIB
# files that file managers leave in folders
LITTER = ("thumbs.db", "desktop.ini")


def image_suffixes() -> tuple[str, ...]:
    """Return the suffixes of the images that this installation reads, in lower case."""
    found = list(SUFFIXES)
    for feature, suffixes in OPTIONAL_SUFFIXES.items():
        if features.check(feature):
            found += suffixes
    if importlib.util.find_spec("pillow_heif") is not None:
        found += HEIF_SUFFIXES
    return tuple(found)


def known_suffixes() -> str:
    """Return the suffixes of images for messages: "known suffixes: jpg ..."."""
    return "known suffixes: " + " ".join(suffix[1:] for suffix in image_suffixes())


def read_of(path: Path) -> Callable[[], bytes]:
    """Return a function that reads an image; it raises OSError unless that is a regular file."""
    return functools.partial(read_bytes, path, most=MOST_IMAGE_BYTES)


def image_files(
    folder: Path, faults: Faults | None = None, *, expected: tuple[str, ...] = ()
) -> list[Path]:
    """Return the images below a folder, sorted; hidden files and folders do not count.

    Args:
        folder: the folder.
        faults: counts files of other kinds, by suffix; None ignores them.
        expected: suffixes of other files that belong to the data set.
    """
    suffixes, found = image_suffixes(), []
    for path in _files(folder):
        if path.suffix.lower() in suffixes:
            found.append(path)
        elif faults is not None and path.suffix.lower() not in expected:
            is_heif = path.suffix.lower() in HEIF_SUFFIXES
            detail = f"to read them: {HEIF_INSTALL}" if is_heif else ""
            faults.add(Fault.OTHER_FILE, str(path), detail, of=path.suffix.lower() or "''")
    return found


def has_images(folder: Path) -> bool:
    """Return whether there is an image below a folder."""
    suffixes = image_suffixes()
    return any(path.suffix.lower() in suffixes for path in _files(folder))


def has_only_images(folder: Path) -> bool:
    """Return whether there are images below a folder, and no other files."""
    suffixes = image_suffixes()
    found = [path.suffix.lower() in suffixes for path in _files(folder)]
    return bool(found) and all(found)


def _files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for name in sorted(names):
            if name[0] != "." and name.lower() not in LITTER:
                yield Path(parent, name)


def subfolders(parent: Path) -> list[Path]:
    """Return the folders in a folder, sorted by name, without hidden ones."""
    folders = [path for path in parent.iterdir() if path.is_dir() and path.name[0] != "."]
    for folder in folders:
        if folder.is_symlink() and parent.resolve().is_relative_to(folder.resolve()):
            raise DataError(f"'{folder}' links to a folder that contains it; remove the link")
        if shown_name(folder.name) != folder.name:
            raise DataError(
                f"'{shown_name(str(folder))}': the name is not UTF-8; rename the folder"
            )
    return sorted(folders, key=lambda folder: folder.name)


def shown_name(name: str) -> str:
    """Return the name of a file, with bytes that are not UTF-8 as \\udcXX."""
    return name.encode(errors="backslashreplace").decode()


def split_folders(root: Path) -> dict[str, Path]:
    """Return split -> folder of the folders that are named after splits.

    Raises:
        DataError: two folders are the same split.
    """
    found: dict[str, Path] = {}
    for folder in subfolders(root):
        split = split_named(folder.name)
        if split in found:
            raise DataError(f"'{found[split]}' and '{folder}' are the same split; keep one of them")
        if split is not None:
            found[split] = folder
    return found
