"""Progress and messages, on standard error; only results go to standard output."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import IO, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

# characters of a line where nothing wraps it
LOG_WIDTH = 160
# longest silence while work continues
QUIET_SECONDS = 30.0


class Advance(Protocol):
    """Reports progress to a progress bar."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Show ``done`` of ``total``, and a short note."""


def console_of(file: IO[str]) -> Console:
    """Return a console for a terminal, or for a file with lines of ``LOG_WIDTH``."""
    console = Console(file=file, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    return console


def stderr_console() -> Console:
    """Return the console for everything that is not a result."""
    return console_of(sys.stderr)


class WarningsToConsole(logging.Handler):
    """Shows raygkd's warnings as single lines."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one."""
        stderr_console().print(f"{record.levelname.lower()}: {record.getMessage()}", soft_wrap=True)


@contextlib.contextmanager
def progress(console: Console, description: str) -> Iterator[Advance]:
    """Show a progress bar; yield a function of (done, total).

    If standard error is not a terminal, a line is printed at the start, after every tenth of the
    work, and on a change after ``QUIET_SECONDS``.
    """
    if not console.is_terminal:
        yield _lines(console, description)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=None, note="")

        def advance(done: int, total: int, note: str = "") -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield advance


def _lines(console: Console, description: str) -> Advance:
    shown, shown_at = -1, 0.0

    def advance(done: int, total: int, note: str = "") -> None:
        nonlocal shown, shown_at
        tenth = 10 * done // max(1, total)
        if tenth != shown or time.monotonic() - shown_at >= QUIET_SECONDS:
            shown, shown_at = tenth, time.monotonic()
            console.print(f"{description}: {done}/{total} {note}".rstrip(), soft_wrap=True)

    return advance
