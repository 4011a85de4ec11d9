"""Registries of extensions by name: methods, data sets, model families, formats and metrics.

A duplicate name raises, and so does an unknown name, with a list of the known names. Other packages
register theirs by entry points. Names and settings are read from the source code, so that
``--help`` imports nothing heavy; an entry is imported when it is looked up.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from raygkd.errors import ConfigError, brief, near

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")


def option(
    default: Any,
    help: str | Callable[[], str],
    *,
    choices: tuple[str, ...] | Callable[[], Sequence[str]] | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    search: Mapping[str, Sequence[Any]] | None = None,
) -> Any:
    """Declare a setting: its default, its help text (with the unit), and the allowed values.

    Args:
        default: default of the setting.
        help: help text, or a function that returns it.
        choices: the allowed values, or a function that returns them.
        minimum: inclusive lower limit.
        above: exclusive lower limit.
        maximum: inclusive upper limit.
        below: exclusive upper limit.
        search: how a search draws it by default, as in a space file: ``{"uniform": (0, 1)}``.
    """
    limits = {"minimum": minimum, "above": above, "maximum": maximum, "below": below}
    return field(
        default=default,
        metadata={"help": help, "choices": choices, "limits": limits, "search": search},
    )


class Registry(Generic[T]):
    """A table of entries of one kind.

    Args:
        kind: kind of the entries, for error messages ("classifier", "dataset").
        group: entry point group for other packages.
        of: type of the entries, such as ``Callable``.
        variable: name of this table in the source code, as in ``@METHODS.register("dkd")``.
        package: package of the modules with entries; "" if entries are registered on import.
    """

    def __init__(self, kind: str, group: str, of: Any, *, variable: str = "", package: str = ""):
        self.kind, self.group = kind, group
        self._of, self._variable, self._package = of, variable, package
        self._entries: dict[str, T] = {}
        self._loaded: dict[EntryPoint, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers an entry; it raises ValueError for a duplicate name."""

        def add(builder: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is already registered")
            self._entries[name] = builder
            return builder

        return add

    def get(self, name: str) -> T:
        """Return an entry.

        Raises:
            ConfigError: the name is unknown, several packages use it, or the package that provides
                it cannot be loaded.
        """
        points = entry_points(self.group).get(name, ())
        own = self._own()
        if name in own and name not in self._entries:
            importlib.import_module(own[name].module)
        if name in self._entries and not points:
            return self._entries[name]
        if not points:
            known = ", ".join(self.names())
            raise ConfigError(
                f"unknown {self.kind} {brief(name)}{near(name, self.names())} (known: {known})"
            )
        [point, *others] = points
        if not others and name not in own and point not in self._loaded:
            self._loaded[point] = self._load(point)
        if point not in self._loaded or self._entries.get(name) not in (None, self._loaded[point]):
            owners = [_package(point) for point in points]
            owners += ["raygkd"] if name in self._entries else []
            raise ConfigError(
                f"{self.kind} {name!r} is provided by several packages ({', '.join(owners)}); "
                "uninstall all but one, or rename it"
            )
        return self._loaded[point]

    def names(self) -> list[str]:
        """Return the known names: those of this package, then those of others."""
        points = entry_points(self.group)
        own = [name for name in (*self._own(), *self._entries) if name not in points]
        return list(dict.fromkeys([*own, *points]))

    def is_own(self, name: str) -> bool:
        """Return whether an entry belongs to this package."""
        return name in self.names() and name not in entry_points(self.group)

    def settings(self) -> dict[str, type]:
        """Return name -> ``Settings`` of every entry that has such a nested class."""
        settings = {name: self._settings_of(name) for name in self.names()}
        return {name: cls for name, cls in settings.items() if cls is not None}

    def summaries(self) -> dict[str, str]:
        """Return name -> first line of the docstring of every entry, "" if it has none."""
        return {name: self._summary_of(name) for name in self.names()}

    def names_with(self, fact: str) -> list[str]:
        """Return the names of the entries whose class sets an attribute to True."""
        return [name for name in self.names() if self._has(name, fact)]

    def _has(self, name: str, fact: str) -> bool:
        if name in self._entries:
            return bool(getattr(self._entries[name], fact))
        points = entry_points(self.group).get(name, ())
        declared = _declared_by(points[0].value) if points else self._own()[name]
        return declared is not None and fact in declared.facts

    def _summary_of(self, name: str) -> str:
        if name in self._entries:
            return _first_line(getattr(self._entries[name], "__doc__", None))
        points = entry_points(self.group).get(name, ())
        declared = _declared_by(points[0].value) if points else self._own()[name]
        return declared.summary if declared is not None else ""

    def _settings_of(self, name: str) -> type | None:
        if name not in self._entries:
            points = entry_points(self.group).get(name, ())
            declared = _declared_by(points[0].value) if points else self._own()[name]
            if declared is None:
                return None
            if not declared.needs_import:
                return declared.settings
        try:
            return own_settings(self.get(name))
        except ConfigError:
            # looking up the entry itself reports the error
            return None

    def _own(self) -> Mapping[str, Declared]:
        return _declared_in(self._package, self._variable) if self._package else {}

    def _load(self, point: EntryPoint) -> T:
        entry = f"{self.kind} {point.name!r} of the package {_package(point)}"
        try:
            loaded = point.load()
        except Exception as error:  # whatever importing it may raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(
                f"{entry} cannot be loaded ({reason}); repair or uninstall the package"
            ) from error
        if not isinstance(loaded, self._of):
            raise ConfigError(
                f"{entry} has type {type(loaded).__name__}, not {self._of.__name__}; repair or "
                "uninstall the package"
            )
        return loaded


def entry_name(value: str) -> str:
    """Return the name of the entry in NAME or NAME:ARGUMENT, as in hf:ORG/NAME."""
    return value.partition(":")[0]


def either(names: Sequence[str]) -> str:
    """Join names as in "a, b or c"."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def own_settings(entry: Any) -> type | None:
    """Return the class ``Settings`` nested in an entry's class; inherited ones do not count."""
    return vars(entry).get("Settings") if isinstance(entry, type) else None


@dataclass(frozen=True)
class Declared:
    """An entry as declared in the source code.

    Attributes:
        module: its module.
        settings: its class ``Settings``; None if it has none.
        needs_import: whether that class uses names of its module, so that it must be imported.
        summary: first line of its docstring.
        facts: names of the attributes that its class sets to True.
    """

    module: str
    summary: str
    settings: type | None = None
    needs_import: bool = False
    facts: frozenset[str] = frozenset()


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0].removesuffix(".")


@functools.cache
def _declared_in(package: str, variable: str) -> dict[str, Declared]:
    """Return name -> entry decorated by ``@variable.register(name)``, for a package's modules."""
    folder = Path(__file__).parent.joinpath(*package.split(".")[1:])
    found = {}
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text()
        if f"@{variable}.register(" in text:
            parts = path.relative_to(folder).with_suffix("").parts
            for node in ast.parse(text).body:
                for name in _registered_names(node, variable):
                    found[name] = _declared(".".join((package, *parts)), node)
    return found


def _registered_names(node: ast.stmt, variable: str) -> Iterator[str]:
    for decorator in getattr(node, "decorator_list", ()):
        match decorator:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id=owner), attr="register"),
                args=[ast.Constant(value=str(name)), *_],
            ) if owner == variable:
                yield name


@functools.cache
def _declared_by(value: str) -> Declared | None:
    """Return the entry of an entry point ("package.module:Name"); None if it is not found."""
    module, _, name = value.partition(":")
    with contextlib.suppress(ImportError, OSError, SyntaxError):
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.origin is not None:
            for node in ast.parse(Path(spec.origin).read_text()).body:
                if getattr(node, "name", None) == name:
                    return _declared(module, node)
    return None


def _declared(module: str, node: ast.stmt) -> Declared:
    documented = isinstance(node, ast.ClassDef | ast.FunctionDef)
    summary = _first_line(ast.get_docstring(node) if documented else None)  # type: ignore[arg-type]
    facts = frozenset(_true_attributes(node))
    for inner in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(inner, ast.ClassDef) and inner.name == "Settings":
            scope: dict[str, Any] = {"dataclass": dataclass, "option": option, "__name__": module}
            try:
                code = compile(ast.Module([inner], []), module, "exec", dont_inherit=True)
                exec(code, scope)
            except NameError:
                return Declared(module, summary, needs_import=True, facts=facts)
            return Declared(module, summary, scope["Settings"], facts=facts)
    return Declared(module, summary, facts=facts)


def _true_attributes(node: ast.stmt) -> Iterator[str]:
    for inner in node.body if isinstance(node, ast.ClassDef) else ():
        match inner:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=True)):
                yield name


def entry_points(group: str) -> Mapping[str, Sequence[EntryPoint]]:
    """Return name -> entry points of a group, of all installed packages.

    Args:
        group: name of the group, such as "raygkd.classifiers".
    """
    return _entry_points(group, tuple(sys.path))


@functools.cache
def _entry_points(group: str, path: tuple[str, ...]) -> dict[str, list[EntryPoint]]:
    # imported here because it takes longer than everything else that --help imports
    import importlib.metadata

    found: dict[str, list[EntryPoint]] = {}
    for point in importlib.metadata.entry_points(group=group):
        found.setdefault(point.name, []).append(point)
    return found


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


# values of ``--method``; the group keeps its name from when all methods were baselines
METHODS: Registry[Any] = Registry(
    "method", "raygkd.baselines", type, variable="METHODS", package="raygkd.losses"
)
# values of ``--dataset``, besides "parquet"
DATASETS: Registry[Any] = Registry(
    "dataset", "raygkd.datasets", type, variable="DATASETS", package="raygkd.data.sets"
)
# prefixes of model names, before the colon
FAMILIES: Registry[Any] = Registry(
    "model family", "raygkd.model_families", type, variable="FAMILIES", package="raygkd.models"
)
# values of ``raygkd export --format``
FORMATS: Registry[Any] = Registry(
    "format", "raygkd.formats", type, variable="FORMATS", package="raygkd.deploy.exporters"
)
# metrics besides those by which models are ranked
METRICS: Registry[Any] = Registry(
    "metric", "raygkd.metrics", type, variable="METRICS", package="raygkd.metrics"
)
