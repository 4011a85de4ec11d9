"""Name -> builder tables: a duplicate raises, an unknown name lists the known ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from raygkd.errors import ConfigError, near

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of builders of one kind.

    Args:
        kind: what the entries are, as it is shown in errors ("classifier", "dataset").
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorate a builder to enter it under ``name``; ValueError when the name is taken."""

        def enter(builder: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered already")
            self._entries[name] = builder
            return builder

        return enter

    def get(self, name: str) -> T:
        """Return the builder; ConfigError with the known names when there is none."""
        if name not in self._entries:
            known = ", ".join(self.names())
            raise ConfigError(
                f"unknown {self.kind} {name!r}{near(name, self.names())} (known: {known})"
            )
        return self._entries[name]

    def names(self) -> list[str]:
        """Return the known names in the order they were registered."""
        return list(self._entries)
