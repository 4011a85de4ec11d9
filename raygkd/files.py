"""Files that appear whole or not at all, and journals whose lines do."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from raygkd.errors import StorageError

# what no other content of a file would help against
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; what is written there takes its place at the end.

    If the block raises, the temporary file is removed and ``path`` is as it was.

    Raises:
        StorageError: there is no space left, or the folder is read-only.
        OSError: the file cannot be moved to its place for another reason.
    """
    path = Path(path)
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


def make_folder(path: Path) -> None:
    """Make a folder, with those above it, where there is none.

    Raises:
        StorageError: there is no space left, or the folder above is read-only.
    """
    with telling_of_storage(path):
        path.mkdir(parents=True, exist_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, and the folder for it where there is none.

    Raises:
        StorageError: there is no space left, or the folder is read-only.
    """
    make_folder(path.parent)
    with whole_file(path) as temporary:
        temporary.write_text(text)


def append_line(path: Path, line: str) -> None:
    """Write a line at the end of a file; it is there as a whole, also after a crash, or not at all.

    Raises:
        StorageError: there is no space left, or the folder is read-only.
    """
    text = f"{line}\n".encode()
    with telling_of_storage(path):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(file).st_size
            if os.write(file, text) < len(text):
                os.ftruncate(file, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file)
        finally:
            os.close(file)


def whole_lines(path: Path) -> list[str]:
    """Return the lines of a journal, none if there is no file.

    A last line that a crash has cut off is removed from the file.
    """
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        os.truncate(path, len(whole))
    return whole.decode().splitlines()


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
