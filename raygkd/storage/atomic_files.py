"""Atomically written files, on this machine or in an object store."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from raygkd.errors import ConfigError, StorageError
from raygkd.storage.object_store import RemotePath, remote_path

# the path of a file or folder; a RemotePath if it is in an object store
Place = Path | RemotePath

# errors that do not depend on the content of the file
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def place(text: str | os.PathLike[str] | RemotePath) -> Place:
    """Return the absolute path of a file or folder.

    Args:
        text: a path, or ``s3://BUCKET/KEY`` or ``gs://BUCKET/KEY``; a RemotePath is returned as is.

    Raises:
        ConfigError: the URL is invalid, or no path can be made of the text.
    """
    if isinstance(text, RemotePath):
        return text
    if is_remote(text):
        return remote_path(str(text))
    try:
        return Path(text).expanduser().resolve()
    except (RuntimeError, ValueError) as error:  # a loop of links, no such user, a null character
        raise ConfigError(f"{str(text)!r} is not a usable path: {error}") from error


def is_remote(text: str | os.PathLike[str] | RemotePath) -> bool:
    """Return whether a file or folder is in an object store."""
    return "://" in str(text)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str] | RemotePath) -> Iterator[Path]:
    """Yield a temporary path; the file written there replaces ``path`` at the end.

    If the block raises, the temporary file is removed and ``path`` does not change.

    Raises:
        StorageError: no space is left, the folder is read-only, or the object store fails.
        OSError: the file cannot be renamed for another reason.
    """
    if isinstance(path, RemotePath):
        with tempfile.TemporaryDirectory(prefix="raygkd-") as folder:
            temporary = Path(folder, path.name)
            with storage_errors(temporary):
                yield temporary
            path.upload(temporary)
        return
    path = Path(path)
    # in the same folder, so that a rename suffices
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        try:
            yield temporary
            with temporary.open("rb") as file:
                # if the machine crashes, either the old or the new file remains, never an empty one
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()


@contextlib.contextmanager
def local_copy(path: Place) -> Iterator[Path]:
    """Yield the path of a file on this machine: the file itself, or a temporary copy.

    Raises:
        OSError: the file does not exist, is a folder, or is no regular file.
        StorageError: the object store fails.
    """
    if isinstance(path, Path):
        require_regular(path)
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="raygkd-") as folder:
        copy = Path(folder, path.name)
        path.download(copy)
        yield copy


def require_regular(path: Path) -> None:
    """Check that a path is a file with an end: to read a pipe could take for ever.

    Raises:
        OSError: it does not exist, is a folder, or is no regular file.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.ENOTSUP, "not a regular file", str(path))


def modified(path: Place) -> float:
    """Return the time of a file's last change, in seconds since 1970."""
    return path.stat().st_mtime if isinstance(path, Path) else path.modified()


def make_folder(path: Place) -> None:
    """Create a folder and its parents if missing; object stores need no folders.

    Raises:
        StorageError: no space is left, or the parent folder is read-only.
    """
    if isinstance(path, Path):
        with storage_errors(path):
            path.mkdir(parents=True, exist_ok=True)


def remove_folder(path: Place) -> None:
    """Remove a folder and its contents, if it exists."""
    if isinstance(path, RemotePath):
        path.remove()
    elif path.exists():
        shutil.rmtree(path)


def write_text(path: Place, text: str) -> None:
    """Write a text file, and create its folder if missing.

    Raises:
        StorageError: it cannot be written.
    """
    make_folder(path.parent)
    with whole_file(path) as temporary:
        temporary.write_text(text)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Raise a StorageError if the block fails because ``path`` cannot be written."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        # torch.save raises its own error while handling the system's
        while cause is not None:
            if isinstance(cause, OSError) and cause.errno in _UNWRITABLE:
                raise StorageError(f"cannot write {path}: {os.strerror(cause.errno)}") from error
            cause = cause.__cause__ or cause.__context__
        raise
