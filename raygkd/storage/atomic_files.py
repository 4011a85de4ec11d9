"""Atomically written files, on this machine or in an object store."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from raygkd.errors import ConfigError, StorageError, brief
from raygkd.storage.object_store import RemotePath, remote_path
from raygkd.storage.temporary import temporary_folder

# the path of a file or folder; a RemotePath if it is in an object store
Place = Path | RemotePath

# bytes of a path and of a name, on Linux
_LONGEST_PATH, _LONGEST_NAME = 4095, 255
# errors that do not depend on the content of the file
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
# and those that other files may have as well: a lost permission, disk, server or folder
_LOST = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOENT, errno.ENOTDIR)


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
    with _usable(text):
        return local_path(text).resolve()


def local_path(text: str | os.PathLike[str]) -> Path:
    """Return a path on this machine, with ``~`` expanded, and as relative as it was given.

    Raises:
        ConfigError: no path can be made of the text.
    """
    with _usable(text):
        if not str(text):
            raise ValueError("it is empty")
        if str(text).startswith(("s3:", "gs:")):
            raise ValueError(f"the URL of an object store starts with {str(text)[:3]}//")
        path = Path(text).expanduser()
        longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
        if len(os.fsencode(path)) > _LONGEST_PATH or longest > _LONGEST_NAME:
            raise ValueError("it is too long")
        if "\0" in str(path):
            raise ValueError("it has a null character")
        return path


@contextlib.contextmanager
def _usable(text: str | os.PathLike[str]) -> Iterator[None]:
    """Tell what Python raises for a text that names no path in one line."""
    try:
        yield
    # no such user, a loop of links, or no working folder any more
    except (RuntimeError, ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or brief(str(error), quoted=False)
        if isinstance(error, RuntimeError) and str(text).startswith("~"):
            reason = "there is no such user"
        if isinstance(error, FileNotFoundError):
            reason = "the working folder no longer exists"
        raise ConfigError(f"{brief(str(text))} is not a usable path: {reason}") from error


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
        with temporary_folder("files") as folder:
            temporary = folder / path.name
            with storage_errors(temporary):
                yield temporary
            path.upload(temporary)
        return
    path = Path(path)
    # in the same folder, so that a rename suffices
    start = path.name if len(os.fsencode(path.name)) <= _LONGEST_NAME // 2 else path.name[:30]
    temporary = path.with_name(f".{start}.{os.getpid()}.tmp")
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
        OSError: the file does not exist, is a folder, or is not a regular file.
        StorageError: the object store fails.
    """
    if isinstance(path, Path):
        require_regular(path)
        yield path
        return
    with temporary_folder("files") as folder:
        copy = folder / path.name
        path.download(copy)
        yield copy


def require_regular(path: Path) -> None:
    """Check that a path is a file with an end: to read a pipe could take for ever.

    Raises:
        OSError: it does not exist, is a folder, or is not a regular file.
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
    except StorageError:
        raise
    except Exception as error:
        number = _unwritable(error, path)
        if number is None:
            raise
        raise StorageError(f"cannot write {path}: {os.strerror(number)}") from error


def _unwritable(error: BaseException, path: Path) -> int | None:
    """Return the number of the system's error that kept ``path`` from being written, or None."""
    cause: BaseException | None = error
    # torch.save raises its own error while handling the system's
    while cause is not None:
        if isinstance(cause, OSError):
            if cause.errno in _UNWRITABLE:
                return cause.errno
            if cause.errno in _LOST and _is_beside(cause.filename, path):
                return cause.errno
        cause = cause.__cause__ or cause.__context__
    # torch.save's own has no number
    if isinstance(error, RuntimeError) and not path.parent.is_dir():
        return errno.ENOENT
    if isinstance(error, RuntimeError) and not os.access(path.parent, os.W_OK | os.X_OK):
        return errno.EACCES
    return None


def _is_beside(filename: object, path: Path) -> bool:
    """Return whether an error is about a file in the folder of ``path``, or about no other file."""
    if filename is None:
        return True
    if not isinstance(filename, str | os.PathLike):
        return False
    parent = Path(filename).parent
    return parent == path.parent or path.is_relative_to(Path(filename))
