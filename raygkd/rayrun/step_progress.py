"""How far a training is within its epoch, as reported by its process: in a file, if by a worker."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from typing import NamedTuple

from raygkd.engine import Training
from raygkd.storage.atomic_files import Place, is_remote, write_text

# from one report to the next: in a folder, and in an object store, whose writes training waits for
SECONDS, REMOTE_SECONDS = 1.0, 10.0


class Steps(NamedTuple):
    """How far a training is: the epoch from 1, its share that is done, the speed and what is left.

    The seconds left are those of the steps of the run; validation comes on top.
    """

    epoch: int
    share: float
    images_per_second: float
    seconds_left: float

    def __str__(self) -> str:
        """Return it as a note beside a progress bar."""
        minutes, seconds = divmod(round(self.seconds_left), 60)
        return (
            f"epoch {self.epoch}: {self.share:.0%}, {self.images_per_second:,.0f} images/s, "
            f"{minutes}:{seconds:02d} left"
        )


TellSteps = Callable[[Steps], None]


class StepReport:
    """Is called after each step; reports the first one, and later ones at intervals.

    Args:
        tell: is called with the steps.
        batch_size: images of a step on all ranks.
        seconds: least time from one report to the next.
    """

    def __init__(self, tell: TellSteps, batch_size: int, seconds: float = SECONDS):
        self._tell, self._batch_size, self._seconds = tell, batch_size, seconds
        self._next = 0.0

    def __call__(self, training: Training) -> None:
        """Report how far the training is, if it is time."""
        part = training.part
        now = time.monotonic()
        if part is None or now < self._next:
            return
        self._next = now + self._seconds
        per_epoch = training.stream.steps_per_epoch
        left = (training.epochs - training.epoch) * per_epoch - part.steps
        step_seconds = part.seconds / part.steps
        self._tell(
            Steps(
                epoch=training.epoch + 1,
                share=part.steps / per_epoch,
                images_per_second=self._batch_size / step_seconds,
                seconds_left=left * step_seconds,
            )
        )


class StepFile:
    """A file through which a worker reports its steps to the driver.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Place):
        self._path = folder / "steps.json"
        self.seconds = REMOTE_SECONDS if is_remote(folder) else SECONDS

    def write(self, steps: Steps) -> None:
        """Replace the previous report."""
        write_text(self._path, json.dumps(steps))

    def read(self) -> Steps | None:
        """Return the last report; None if there is none."""
        with contextlib.suppress(FileNotFoundError):
            return Steps(*json.loads(self._path.read_bytes()))
        return None

    def remove(self) -> None:
        """Remove the file."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
