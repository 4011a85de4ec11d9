"""Journals: lines that are appended one by one, each atomically."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, Protocol

from raygkd.errors import DataError
from raygkd.storage.atomic_files import Place, storage_errors
from raygkd.storage.object_store import RemotePath
from raygkd.storage.reading import check_type, decode_text, parse_json, read_bytes

# size of a part in an object store, which is rewritten for each of its lines
PART_BYTES = 64 << 10


class Journal(Protocol):
    """A file to which one process appends lines, and that any process can read."""

    def lines(self) -> list[str]:
        """Return the lines in the order in which they were appended.

        Raises:
            OSError: they cannot be read, or are not UTF-8.
        """
        ...

    def append(self, line: str) -> None:
        """Write a line durably: it survives a crash of this process.

        Raises:
            StorageError: it cannot be written.
        """
        ...


def open_journal(place: Place) -> Journal:
    """Return a journal: a file or, in an object store, a folder of parts."""
    return PartsJournal(place) if isinstance(place, RemotePath) else FileJournal(place)


def read_entries(place: Place, kind: Any, *, remedy: str = "") -> list[Any]:
    """Return the entries of a journal whose lines are JSON; none if there is no journal.

    Args:
        place: of the journal.
        kind: of each entry, as in ``check_type``.
        remedy: what to do with a damaged line, for messages.

    Raises:
        DataError: a line is damaged, or the journal cannot be read.
    """
    try:
        lines = open_journal(place).lines()
    except OSError as error:
        raise DataError(f"{place} cannot be read: {error.strerror}") from error
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = parse_json(line)
            check_type(entry, kind)
        except ValueError as error:
            advice = f"; {remedy}" if remedy else ""
            raise DataError(f"{place} line {number} is damaged ({error}){advice}") from error
        entries.append(entry)
    return entries


class FileJournal:
    """A journal in a file.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path):
        self._path = path
        self._is_repaired = False

    def lines(self) -> list[str]:
        """Return the complete lines, without a line that a crash truncated."""
        if not self._path.exists():
            return []
        text = read_bytes(self._path)
        return decode_text(text[: text.rfind(b"\n") + 1], self._path).splitlines()

    def append(self, line: str) -> None:
        """Write a line atomically, after removing a line that a crash truncated."""
        text = f"{line}\n".encode()
        with storage_errors(self._path):
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                if not self._is_repaired:
                    self._repair(file)
                size = os.fstat(file).st_size
                if os.write(file, text) < len(text):
                    os.ftruncate(file, size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file)
            finally:
                os.close(file)

    def _repair(self, file: int) -> None:
        """Remove a truncated line at the end."""
        text = self._path.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            os.ftruncate(file, whole)
        self._is_repaired = True


class PartsJournal:
    """A journal in an object store, whose objects can be written but not appended to.

    The newest part is rewritten with each line until it is full. Every process starts a new part,
    also after an interrupted write, so that a delayed write cannot overwrite later lines. Threads
    must not append at the same time.

    Args:
        path: path of the folder.
    """

    def __init__(self, path: RemotePath):
        self._path = path
        self._number: int | None = None
        self._text = b""

    def lines(self) -> list[str]:
        """Return the lines of all parts."""
        parts = sorted(self._path.iterdir())
        return decode_text(b"".join(map(read_bytes, parts)), self._path).splitlines()

    def append(self, line: str) -> None:
        """Rewrite the newest part with the new line."""
        if self._number is None:
            numbers = [int(part.name[5:10]) for part in self._path.iterdir()]
            self._number = max(numbers, default=-1) + 1
        number, text = self._number, self._text + f"{line}\n".encode()
        # the next line starts a new part, unless this write succeeds
        self._number, self._text = number + 1, b""
        (self._path / f"part-{number:05d}.jsonl").write_bytes(text)
        if len(text) < PART_BYTES:
            self._number, self._text = number, text
