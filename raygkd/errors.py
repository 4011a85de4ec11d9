"""Exceptions that a user can act on; the command line prints them without a traceback."""

from __future__ import annotations

import difflib
import os
import reprlib
import shlex
import traceback
import unicodedata
from collections.abc import Iterable
from typing import Any

# characters of the text of a foreign exception that are shown
LONGEST_TEXT = 300
# characters of a foreign value that are shown, and how much of what it contains
LONGEST_VALUE = 120
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 2, 80, 80, 40
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = _SHORT.maxset = 4


class UserError(Exception):
    """A mistake in the user's input: one line that says what is wrong, where, and what to do."""


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
            f"loss '{self.term}' is not finite in epoch {self.epoch}; lower --lr, raise "
            "--warmup-epochs, or set --clip-norm"
        )


class ClusterLost(RunFailed):
    """A process of the local cluster has ended; printed at once, since Ray may end this process."""


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


def brief(value: Any, *, quoted: bool = True) -> str:
    """Return a value of a person or a file for messages, in one line and never whole if large.

    Args:
        value: of any type.
        quoted: show texts as ``repr`` does; else as they are, without line breaks.
    """
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of more than 60 digits"
    if isinstance(value, str) and not quoted:
        shown = " ".join(value.split()) if not value.isprintable() else value
    else:
        shown = " ".join(_SHORT.repr(value).split("\n"))
    return shown if len(shown) <= LONGEST_VALUE else shown[: LONGEST_VALUE - 3] + "..."


def to_paste(*words: object) -> str:
    """Return a command of raygkd as it is pasted into a shell."""
    return shlex.join(["raygkd", *map(str, words)])


def control_characters(text: str) -> str:
    """Return what a text has that no terminal shows, for messages; "" if nothing."""
    if "\n" in text or "\r" in text:
        return "a line break"
    # text of a command line that is not UTF-8 has surrogates, which are bytes of file names
    unseen = [one for one in text if unicodedata.category(one) in ("Cc", "Zl", "Zp")]
    return "a control character" if unseen else ""


def near(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'a' or 'b'?"`` for a misspelled name, or an empty string."""
    # compared in the square of their lengths
    close = difflib.get_close_matches(name[:LONGEST_VALUE], list(known), n=3, cutoff=0.6)
    return "; did you mean " + " or ".join(repr(match) for match in close) + "?" if close else ""
