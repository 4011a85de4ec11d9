"""How the driver asks training processes to stop, and how they answer: through a shared folder."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from raygkd.files import make_folder

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class StopFolder:
    """The folder is the question, a file in it the answer of one run.

    Attributes:
        path: absolute, on storage that all nodes share.
    """

    path: Path

    def ask(self) -> None:
        """Ask every run of the command to finish its step, write a checkpoint and answer."""
        make_folder(self.path)

    def withdraw(self) -> None:
        """Make it as if nobody had asked."""
        if self.path.exists():
            shutil.rmtree(self.path)

    def is_asked(self) -> bool:
        """Return whether runs are to stop."""
        return self.path.exists()

    def answer(self, name: str) -> None:
        """Tell that the run of a name has stopped."""
        (self.path / name).touch()

    def answered(self) -> set[str]:
        """Return the names of the runs that have stopped."""
        return {path.name for path in self.path.iterdir()}


class StopPoll:
    """Whether a run is to stop, looked up often enough and not at every step.

    Args:
        folder: that is looked at.
    """

    def __init__(self, folder: StopFolder):
        self._folder = folder
        self._next = 0.0
        self._asked = False

    def __call__(self) -> bool:
        """Return it."""
        now = time.monotonic()
        if not self._asked and now >= self._next:
            self._asked = self._folder.is_asked()
            self._next = now + POLL_SECONDS
        return self._asked
