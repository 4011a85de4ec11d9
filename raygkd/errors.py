"""Exceptions that a person can act on; the command line prints them without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user gave: one line of what, where, what is allowed, what to do."""


class ConfigError(UserError):
    """One or several wrong settings, all reported at once."""


class DataError(UserError):
    """Images, labels or files that cannot be used."""


class ResourceError(UserError):
    """The cluster, a port or a folder cannot provide what a run needs."""


class TrackingError(UserError):
    """The MLflow server cannot be reached or used."""


class RunFailed(Exception):
    """Training failed, and not by a mistake that could have been refused before; one line."""


class Diverged(RunFailed):
    """Training went non-finite; raised on every rank of a run after the same epoch.

    Args:
        term: the loss term that is not finite.
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
    """Training was asked to stop and did, between two steps; raised on every rank alike."""


def near(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'a' or 'b'?"`` for a misspelled name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return "; did you mean " + " or ".join(repr(match) for match in close) + "?" if close else ""
