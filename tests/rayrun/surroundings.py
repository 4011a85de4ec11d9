"""The environment of scenes: that in which the tests began, whatever other tests set."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, MutableMapping
from types import MappingProxyType

import pytest


class ByThread(MutableMapping[bytes, bytes]):
    """The variables of ``os.environ``; threads that ask for it have what there is now, for good.

    A thread that goes through the environment (each HTTP request does) breaks where another one
    takes a name out of it meanwhile; and what it starts would have variables of another's test.

    Args:
        variables: what ``os.environ`` keeps them in.
    """

    def __init__(self, variables: MutableMapping[bytes, bytes]):
        self._variables = variables
        # a scene that sets a variable fails: it would have it alone, its processes would not
        self._now = MappingProxyType(dict(variables))
        self._thread = threading.local()

    def keep(self) -> None:
        """Let the thread that calls it have what there was when this was made."""
        self._thread.variables = self._now

    @property
    def _seen(self) -> MutableMapping[bytes, bytes]:
        return getattr(self._thread, "variables", self._variables)

    def __getitem__(self, name: bytes) -> bytes:
        return self._seen[name]

    def __setitem__(self, name: bytes, value: bytes) -> None:
        self._seen[name] = value

    def __delitem__(self, name: bytes) -> None:
        del self._seen[name]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._seen)

    def __len__(self) -> int:
        return len(self._seen)


def by_thread(patch: pytest.MonkeyPatch) -> ByThread:
    """Put this process's environment into one until the patch is undone, and return it."""
    # a name of CPython's own; without it this fails at once
    variables = ByThread(os.environ._data)  # type: ignore[attr-defined]
    patch.setattr(os.environ, "_data", variables)
    return variables
