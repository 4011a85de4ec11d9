"""Temporary folders and files that the next process removes where this one is killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "raygkd-tmp-"
# a younger folder may not have its lock yet
YOUNG_SECONDS = 60.0
# what ``whole_file`` writes before it renames it
_UNFINISHED = re.compile(r"\..+\.[0-9]+\.tmp")
MIB = 1 << 20


@contextlib.contextmanager
def temporary_folder(kind: str, *, parent: Path | None = None) -> Iterator[Path]:
    """Yield a new folder that is removed at the end, and locked until then.

    The lock is on the folder itself and ends with this process.

    Args:
        kind: a word for its name.
        parent: the folder that it is made in; None for the system's.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{kind}-", dir=parent))
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: its folders stay
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_left_folders(*parents: Path) -> tuple[int, int]:
    """Remove the temporary folders of this user's killed processes; return number and bytes.

    Args:
        parents: the folders that they were made in; none for the system's and Ray's.
    """
    count = size = 0
    known = (tempfile.gettempdir(), "/tmp", os.environ.get("RAY_TMPDIR", "/tmp"))
    for parent in {*(parents or map(Path, known))}:
        for folder in parent.glob(f"{_PREFIX}*"):
            with contextlib.suppress(
                OSError
            ):  # it is another user's, or another process removes it
                size += _removed(folder)
                count += 1
    return count, size


def _removed(folder: Path) -> int:
    """Remove a folder whose process has ended; return its bytes.

    Raises:
        OSError: its process may live, or it cannot be removed.
    """
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        status = os.fstat(lock)
        if status.st_uid != os.getuid() or time.time() - status.st_mtime < YOUNG_SECONDS:
            raise BlockingIOError
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        size = _bytes(folder)
        shutil.rmtree(folder)
        return size
    finally:
        os.close(lock)


def remove_unfinished_files(folder: Path) -> tuple[int, int]:
    """Remove the files that killed processes were writing; return number and bytes.

    Args:
        folder: that this process owns, so that no other writes in it.
    """
    count = size = 0
    for path in folder.rglob(".*.tmp"):
        if _UNFINISHED.fullmatch(path.name) and path.is_file():
            with contextlib.suppress(FileNotFoundError):
                size += path.stat().st_size
                path.unlink()
                count += 1
    return count, size


def _bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
