"""Stop requests of the driver to training processes, and their answers, in a shared folder."""

from __future__ import annotations

import time
from dataclasses import dataclass

from raygkd.storage.atomic_files import Place, is_remote, remove_folder, write_text

# between looks at the folder; an object store takes tens of milliseconds for one, which training
# waits for
POLL_SECONDS, REMOTE_POLL_SECONDS = 0.2, 2.0


@dataclass(frozen=True)
class StopFolder:
    """A folder with a file for the stop request, and one for the answer of each run.

    Attributes:
        path: absolute, on storage that all nodes share.
    """

    path: Place

    @property
    def poll_seconds(self) -> float:
        """Seconds between polls."""
        return REMOTE_POLL_SECONDS if is_remote(self.path) else POLL_SECONDS

    def ask(self) -> None:
        """Request every run of the command to finish its step, write a checkpoint and answer."""
        write_text(self._question, "")

    def withdraw(self) -> None:
        """Withdraw the request, with its answers."""
        remove_folder(self.path)

    def is_asked(self) -> bool:
        """Return whether runs are to stop."""
        return self._question.exists()

    def answer(self, name: str) -> None:
        """Report that the run of a name has stopped."""
        write_text(self._answers / name, "")

    def answered(self) -> set[str]:
        """Return the names of the runs that have stopped."""
        answers = self._answers
        return {path.name for path in answers.iterdir()} if answers.exists() else set()

    @property
    def _question(self) -> Place:
        return self.path / "asked"

    @property
    def _answers(self) -> Place:
        return self.path / "stopped"


class StopPoll:
    """Checks for a stop request, at intervals instead of at every step.

    Args:
        folder: of the request.
    """

    def __init__(self, folder: StopFolder):
        self._folder = folder
        self._next = 0.0
        self._asked = False

    def __call__(self) -> bool:
        """Return whether the run is to stop."""
        now = time.monotonic()
        if not self._asked and now >= self._next:
            self._asked = self._folder.is_asked()
            self._next = now + self._folder.poll_seconds
        return self._asked
