"""Name -> builder tables: a duplicate raises, an unknown name lists the known ones.

Other packages add to them by entry points, which are loaded when their name is looked up.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from raygkd.errors import ConfigError, near

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")

# of the losses of other methods, which ``--method`` takes
METHOD_GROUP = "raygkd.baselines"


class Registry(Generic[T]):
    """A table of builders of one kind.

    Args:
        kind: what the entries are, as it is shown in errors ("classifier", "dataset").
        group: of the entry points that other packages have for it.
        of: type of the entries, such as ``Callable``.
    """

    def __init__(self, kind: str, group: str, of: Any):
        self.kind, self.group = kind, group
        self._of = of
        self._entries: dict[str, T] = {}
        self._loaded: dict[EntryPoint, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorate a builder to enter it under ``name``; ValueError when the name is taken."""

        def enter(builder: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered already")
            self._entries[name] = builder
            return builder

        return enter

    def get(self, name: str) -> T:
        """Return the builder; ConfigError with the known names when there is none.

        Raises:
            ConfigError: also where another package's cannot be loaded, or two have the name.
        """
        points = entry_points(self.group).get(name, ())
        if name in self._entries and not points:
            return self._entries[name]
        if not points:
            known = ", ".join(self.names())
            raise ConfigError(
                f"unknown {self.kind} {name!r}{near(name, self.names())} (known: {known})"
            )
        if len(points) > 1 or name in self._entries:
            owners = [_package(point) for point in points]
            owners += ["raygkd"] if name in self._entries else []
            raise ConfigError(
                f"{self.kind} {name!r} is of several packages ({', '.join(owners)}): uninstall "
                "one, or let it use another name"
            )
        [point] = points
        if point not in self._loaded:
            self._loaded[point] = self._load(point)
        return self._loaded[point]

    def names(self) -> list[str]:
        """Return the known names in the order they were registered, those of others last."""
        return list(dict.fromkeys([*self._entries, *entry_points(self.group)]))

    def is_own(self, name: str) -> bool:
        """Return whether a name was registered here, and is not another package's."""
        return name in self._entries

    def _load(self, point: EntryPoint) -> T:
        what = f"{self.kind} {point.name!r} of the package {_package(point)}"
        try:
            loaded = point.load()
        except Exception as error:  # whatever importing it may raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(
                f"{what} cannot be loaded ({reason}): repair or uninstall the package"
            ) from error
        if not isinstance(loaded, self._of):
            raise ConfigError(
                f"{what} is of the type {type(loaded).__name__} and not {self._of.__name__}: "
                "repair or uninstall the package"
            )
        return loaded


def entry_points(group: str) -> Mapping[str, Sequence[EntryPoint]]:
    """Return name -> entry points of a group, of all packages that are installed.

    Args:
        group: such as "raygkd.classifiers".
    """
    return _entry_points(group, tuple(sys.path))


@functools.cache
def _entry_points(group: str, path: tuple[str, ...]) -> dict[str, list[EntryPoint]]:
    # takes longer to import than all that help needs
    import importlib.metadata

    found: dict[str, list[EntryPoint]] = {}
    for point in importlib.metadata.entry_points(group=group):
        found.setdefault(point.name, []).append(point)
    return found


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value
