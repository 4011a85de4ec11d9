"""Files that appear whole or not at all, on this machine or in an object store."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from raygkd.errors import StorageError
from raygkd.storage.object_store import RemotePath, remote_path

# where a file or folder is; it is a RemotePath in an object store
Place = Path | RemotePath

# what no other content of a file would help against
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def place(text: str | os.PathLike[str] | RemotePath) -> Place:
    """Return the absolute place of a file or folder.

    Args:
        text: a path, or ``s3://BUCKET/KEY`` or ``gs://BUCKET/KEY``; a place stays what it is.

    Raises:
        ConfigError: a URL that cannot be used.
    """
    if isinstance(text, RemotePath):
        return text
    return remote_path(str(text)) if is_remote(text) else Path(text).expanduser().resolve()


def is_remote(text: str | os.PathLike[str] | RemotePath) -> bool:
    """Return whether a file or folder is in an object store."""
    return "://" in str(text)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str] | RemotePath) -> Iterator[Path]:
    """Yield a temporary path; what is written there takes the place of ``path`` at the end.

    If the block raises, the temporary file is removed and ``path`` is as it was.

    Raises:
        StorageError: there is no space left, the folder is read-only, or the store refuses it.
        OSError: the file cannot be moved to its place for another reason.
    """
    if isinstance(path, RemotePath):
        with tempfile.TemporaryDirectory(prefix="raygkd-") as folder:
            temporary = Path(folder, path.name)
            with telling_of_storage(temporary):
                yield temporary
            path.upload(temporary)
        return
    path = Path(path)
    # beside the file, so that it need only be renamed
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with telling_of_storage(path):
        try:
            yield temporary
            with temporary.open("rb") as file:
                # a machine that stops leaves the old file or the new one, not an empty one
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()


@contextlib.contextmanager
def local_copy(path: Place) -> Iterator[Path]:
    """Yield the path of a file on this machine: the file itself, or a copy until the block's end.

    Raises:
        FileNotFoundError: there is no such file in the store.
        StorageError: the store does not give it.
    """
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="raygkd-") as folder:
        copy = Path(folder, path.name)
        path.download(copy)
        yield copy


def modified(path: Place) -> float:
    """Return when a file was written, in seconds since 1970."""
    return path.stat().st_mtime if isinstance(path, Path) else path.modified()


def make_folder(path: Place) -> None:
    """Make a folder, with those above it, where there is none; an object store needs none.

    Raises:
        StorageError: there is no space left, or the folder above is read-only.
    """
    if isinstance(path, Path):
        with telling_of_storage(path):
            path.mkdir(parents=True, exist_ok=True)


def remove_folder(path: Place) -> None:
    """Remove a folder with all that is in it, if it is there."""
    if isinstance(path, RemotePath):
        path.remove()
    elif path.exists():
        shutil.rmtree(path)


def write_text(path: Place, text: str) -> None:
    """Write a text file, and the folder for it where there is none.

    Raises:
        StorageError: it cannot be written.
    """
    make_folder(path.parent)
    with whole_file(path) as temporary:
        temporary.write_text(text)


@contextlib.contextmanager
def telling_of_storage(path: Path) -> Iterator[None]:
    """Raise a StorageError for what fails because nothing can be written to ``path``."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        # torch.save has an error of its own, raised while it handled the system's
        while cause is not None:
            if isinstance(cause, OSError) and cause.errno in _UNWRITABLE:
                raise StorageError(f"cannot write {path}: {os.strerror(cause.errno)}") from error
            cause = cause.__cause__ or cause.__context__
        raise
