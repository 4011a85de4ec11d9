"""What can be added by name, each by one decorator in one file: methods, and the like.

A duplicate name raises, an unknown one lists the known ones. Other packages add theirs by entry
points. Names and settings are read from the source, so that ``--help`` imports nothing heavy; an
entry is imported when its name is looked up.
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

from raygkd.errors import ConfigError, near

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
    """Declare a setting: its default, what it means (with its unit), and what is allowed.

    Args:
        default: of the setting.
        help: what it means, or a function that returns that.
        choices: the allowed values, or a function that returns them.
        minimum: the least allowed number.
        above: what a number must be above.
        maximum: the largest allowed number.
        below: what a number must be below.
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
        kind: what the entries are, as it is shown in errors ("classifier", "dataset").
        group: of the entry points that other packages have for it.
        of: type of the entries, such as ``Callable``.
        variable: name of this table in the sources, as in ``@METHODS.register("dkd")``.
        package: whose modules have entries; "" where they are registered by importing them.
    """

    def __init__(self, kind: str, group: str, of: Any, *, variable: str = "", package: str = ""):
        self.kind, self.group = kind, group
        self._of, self._variable, self._package = of, variable, package
        self._entries: dict[str, T] = {}
        self._loaded: dict[EntryPoint, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorate a builder to enter it under ``name``; ValueError when the name is taken."""

        def enter(builder: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is already registered")
            self._entries[name] = builder
            return builder

        return enter

    def get(self, name: str) -> T:
        """Return the entry; ConfigError with the known names when there is none.

        Raises:
            ConfigError: also where another package's cannot be loaded, or two have the name.
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
                f"unknown {self.kind} {name!r}{near(name, self.names())} (known: {known})"
            )
        [point, *others] = points
        if not others and name not in own and point not in self._loaded:
            self._loaded[point] = self._load(point)
        if point not in self._loaded or self._entries.get(name) not in (None, self._loaded[point]):
            owners = [_package(point) for point in points]
            owners += ["raygkd"] if name in self._entries else []
            raise ConfigError(
                f"{self.kind} {name!r} is of several packages ({', '.join(owners)}): uninstall "
                "one, or let it use another name"
            )
        return self._loaded[point]

    def names(self) -> list[str]:
        """Return the known names: those of this package, then those of others."""
        points = entry_points(self.group)
        own = [name for name in (*self._own(), *self._entries) if name not in points]
        return list(dict.fromkeys([*own, *points]))

    def is_own(self, name: str) -> bool:
        """Return whether a name was registered here, and is not another package's."""
        return name in self.names() and name not in entry_points(self.group)

    def settings(self) -> dict[str, type]:
        """Return name -> ``Settings`` of every entry whose class has such a class in it."""
        found = {name: self._settings_of(name) for name in self.names()}
        return {name: settings for name, settings in found.items() if settings is not None}

    def summaries(self) -> dict[str, str]:
        """Return name -> first line of the documentation of every entry, "" where it has none."""
        return {name: self._summary_of(name) for name in self.names()}

    def names_with(self, fact: str) -> list[str]:
        """Return the names of the entries whose class has an attribute that is true."""
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
            # whoever asks for the entry itself is told
            return None

    def _own(self) -> Mapping[str, Declared]:
        return _declared_in(self._package, self._variable) if self._package else {}

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


def either(names: Sequence[str]) -> str:
    """Return names as a text: "a, b or c"."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def own_settings(entry: Any) -> type | None:
    """Return the class ``Settings`` in an entry's class; one that is inherited does not count."""
    return vars(entry).get("Settings") if isinstance(entry, type) else None


@dataclass(frozen=True)
class Declared:
    """An entry as its source has it.

    Attributes:
        module: where it is.
        settings: its class ``Settings``, None where there is none.
        needs_import: that class needs names of its module, and so cannot be read by itself.
        summary: first line of its documentation.
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
    """Return name -> what ``@variable.register(name)`` decorates, of all modules of a package."""
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
    """Return what an entry point names ("package.module:Name"); None where it is not found."""
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


# what ``--method`` takes; the group keeps the name that it had when they were all baselines
METHODS: Registry[Any] = Registry(
    "method", "raygkd.baselines", type, variable="METHODS", package="raygkd.losses"
)
# what ``--dataset`` takes, beside "parquet"
DATASETS: Registry[Any] = Registry(
    "dataset", "raygkd.datasets", type, variable="DATASETS", package="raygkd.data"
)
# what stands before the colon of a model's name
FAMILIES: Registry[Any] = Registry(
    "model family", "raygkd.model_families", type, variable="FAMILIES", package="raygkd.models"
)
# what ``raygkd export --format`` takes
FORMATS: Registry[Any] = Registry(
    "format", "raygkd.formats", type, variable="FORMATS", package="raygkd.deploy.exporters"
)
# measures beside those that models are ranked by
METRICS: Registry[Any] = Registry(
    "metric", "raygkd.metrics", type, variable="METRICS", package="raygkd.metrics"
)
