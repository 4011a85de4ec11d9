"""Exceptions that a user can act on; the command line prints them without a traceback."""

from __future__ import annotations

import difflib
import os
import traceback
from collections.abc import Iterable

# characters of the text of a foreign exception that are shown
LONGEST_TEXT = 300


class UserError(Exception):
    """A mistake in the user's input: one line of what, where, what is allowed and what to do."""


class ConfigError(UserError):
    """One or several wrong settings, all reported at once."""


class ImageSizeError(ConfigError):
    """Images of a size that a model cannot take."""


class DataError(UserError):
    """Images, labels or files that cannot be used."""

    def __init__(self, message: str):
        # names in files may have line breaks
        super().__init__(" ".join(message.splitlines()))


class ResourceError(UserError):
    """The cluster, a port or a folder cannot provide what a run needs."""


class TrackingError(UserError):
    """The MLflow server cannot be reached or used."""


class RunFailed(Exception):
    """Training failed for a reason that could not be checked before; one line."""


class Diverged(RunFailed):
    """A loss became non-finite; raised on every rank of a run after the same epoch.

    Args:
        term: the non-finite loss term.
        epoch: number of the epoch, from 1.
    """

    def __init__(self, term: str, epoch: int):
        super().__init__(term, epoch)
        self.term, self.epoch = term, epoch

    def __str__(self) -> str:
        return (
            f"loss '{self.term}' is not finite in epoch {self.epoch}: lower --lr, raise "
            "--warmup-epochs, or set --clip-norm"
        )


class StorageError(RunFailed):
    """A file cannot be written: no space is left, or the folder has become read-only."""


class Stopped(Exception):
    """Training stopped on request, between two steps; raised on every rank."""


def reason_of(error: BaseException) -> str:
    """Return in one line where outside of torch an exception was raised, its type and its text."""
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if f"{os.sep}torch{os.sep}" not in frame.filename]
    where = (outside or frames)[-1]
    return f"{os.path.basename(where.filename)}, line {where.lineno}: {text_of(error)}"


def text_of(error: BaseException) -> str:
    """Return type and text of an exception in one line."""
    kind = type(error).__name__
    try:
        text = " ".join(str(error).split())[:LONGEST_TEXT]
    except Exception:  # an exception of a person's own may raise another
        return kind
    return f"{kind}: {text}" if text else kind


def near(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'a' or 'b'?"`` for a misspelled name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return "; did you mean " + " or ".join(repr(match) for match in close) + "?" if close else ""
