"""Ctrl-C, SIGTERM and a closed terminal.

The first stops runs after a checkpoint; the second stops everything.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

from raygkd.errors import StorageError
from raygkd.rayrun.stop_signal import POLL_SECONDS, StopFolder
from raygkd.storage.terminal import leave_closed_terminal

# of the 15 seconds that a stop may take; the rest is for MLflow and Ray
ANSWER_SECONDS = 8.0
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def handled_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that stop a run, among them a closed terminal's unless nohup has it."""
    has_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return SIGNALS if has_nohup else (*SIGNALS, signal.SIGHUP)


class Interrupts:
    """Turns the first signal into a stop request and a KeyboardInterrupt; the second exits at once.

    A thread sends the request and polls for answers: an object store may be slow, and signal
    handlers must not block.

    Args:
        folder: for the stop request to the training processes.
        tell: shows a line.
    """

    def __init__(self, folder: StopFolder, tell: Callable[[str], None]):
        self.folder = folder
        self._tell = tell
        self._deadline: float | None = None
        self._running: Callable[[], Collection[str]] = tuple
        self._must_ask, self._is_over = threading.Event(), threading.Event()
        self._answered: set[str] = set()

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Handle signals inside the block."""
        self.folder.withdraw()
        asking = threading.Thread(target=self._ask, name="asks-to-stop", daemon=True)
        asking.start()
        before = {number: signal.signal(number, self._on_signal) for number in handled_signals()}
        alarm = signal.signal(signal.SIGALRM, self._on_alarm)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            for number, handler in [*before.items(), (signal.SIGALRM, alarm)]:
                signal.signal(number, handler)
            self._is_over.set()
            self._must_ask.set()
            asking.join()
            if self._deadline is not None:
                self.folder.withdraw()

    @contextlib.contextmanager
    def waiting_for(self, running: Callable[[], Collection[str]]) -> Iterator[None]:
        """Let a stop inside the block wait for the checkpoints of these runs.

        Args:
            running: returns the names of the active runs.
        """
        self._running = running
        try:
            yield
        finally:
            self._running = tuple

    def raise_lost(self) -> None:
        """Raise an interrupt again that was lost, as in a library's callback, where errors are.

        Raises:
            KeyboardInterrupt: a stop was requested inside the block of ``handled``.
        """
        if self._deadline is not None:
            raise KeyboardInterrupt

    def _on_signal(self, number: int, frame: Any) -> None:
        if number == signal.SIGHUP:
            leave_closed_terminal()
        if self._deadline is not None:
            os.write(2, b"stopped at once\n")
            os._exit(130)
        self._deadline = time.monotonic() + ANSWER_SECONDS
        if not self._running():
            raise KeyboardInterrupt
        self._tell(
            "stopping after this step, with a checkpoint; press Ctrl-C again to stop at once"
        )
        self._must_ask.set()
        signal.setitimer(signal.ITIMER_REAL, POLL_SECONDS, POLL_SECONDS)

    def _on_alarm(self, number: int, frame: Any) -> None:
        assert self._deadline is not None
        late = time.monotonic() > self._deadline
        if late or set(self._running()) <= self._answered:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            raise KeyboardInterrupt

    def _ask(self) -> None:
        """Wait for the signal, send the stop request, and poll for answers until the block ends."""
        self._must_ask.wait()
        if self._is_over.is_set():
            return
        try:
            self.folder.ask()
            while not self._is_over.wait(self.folder.poll_seconds):
                self._answered = self.folder.answered()
        except (OSError, StorageError) as error:
            self._tell(f"stopping at once: {error}")
            self._deadline = time.monotonic()
