"""The settings of a run as one tree, made of plain values and turned back into them.

All problems are collected and raised at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from raygkd.config.defaults import dependent_defaults
from raygkd.config.schema import (
    SECTIONS,
    ClusterConfig,
    CompareConfig,
    DataConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    OutputConfig,
    SearchConfig,
    settings,
)
from raygkd.config.validation import check_together, check_value
from raygkd.config.values import WorkerRange, coerce
from raygkd.errors import ConfigError, near


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run; a ConfigError at construction lists every problem, a line each."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)

    def __post_init__(self) -> None:
        problems = [
            problem for _, leaf, value in _leaves(self) for problem in check_value(leaf, value)
        ]
        problems += check_together(
            data=self.data,
            method=self.method,
            optim=self.optim,
            cluster=self.cluster,
            output=self.output,
            search=self.search,
            compare=self.compare,
        )
        if problems:
            raise ConfigError("\n".join(problems))


def _leaves(config: Config) -> Iterator[tuple[str, dataclasses.Field, Any]]:
    for section in SECTIONS:
        part = getattr(config, section)
        for leaf in dataclasses.fields(part):
            yield section, leaf, getattr(part, leaf.name)


def check_keys(tree: Mapping[str, Any], *, where: str) -> None:
    """Refuse unknown sections and settings, with the near ones, all in one ConfigError.

    Args:
        tree: section -> setting -> value.
        where: the file, named in errors.
    """
    problems = _key_problems(tree, where)
    if problems:
        raise ConfigError("\n".join(problems))


def _key_problems(tree: Mapping[str, Any], where: str) -> list[str]:
    problems: list[str] = []
    known = settings()
    for section, leaves in tree.items():
        if section not in SECTIONS:
            hint = near(str(section), [*SECTIONS, *known])
            if section in known:
                hint = f" (it belongs under '{known[section][0]}:')"
            sections = ", ".join(SECTIONS)
            problems.append(f"{where}: unknown key {section!r}{hint} (sections: {sections})")
        elif not isinstance(leaves, Mapping):
            problems.append(f"{where}: {section!r} must hold settings, not {leaves!r}")
        else:
            problems += [
                f"{where}: unknown key '{section}.{name}'{near(str(name), known)}"
                for name in leaves
                if name not in known or known[name][0] != section
            ]
    return problems


def from_mapping(tree: Mapping[str, Any], *, where: str = "configuration") -> Config:
    """Build a Config of a tree of plain values, as YAML gives it.

    Args:
        tree: section -> setting -> value; what is left out has its default, which for some
            settings is the data set's own (``DATASET_DEFAULTS``), or what suits detectors where one
            is named.
        where: the file, named in errors.

    Raises:
        ConfigError: an unknown section or setting (with the near ones) or a value that is not
            allowed; all problems in one error, a line each.
    """
    problems = _key_problems(tree, where)
    beyond_limits: list[str] = []
    defaults = dependent_defaults(tree)
    parts: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for name, (section, leaf, kind) in settings().items():
        leaves = tree.get(section)
        if not isinstance(leaves, Mapping) or name not in leaves:
            if name in defaults:
                parts[section][name] = defaults[name]
            continue
        try:
            parts[section][name] = coerce(name, kind, leaves[name])
        except ConfigError as error:
            problems.append(f"{where}: {error}")
        else:
            beyond_limits += check_value(leaf, parts[section][name])
    if problems:
        # no checks between settings: they would speak of defaults in the place of what is wrong
        raise ConfigError("\n".join(problems + beyond_limits))
    return Config(**{section: SECTIONS[section](**leaves) for section, leaves in parts.items()})


def to_mapping(config: Config) -> dict[str, dict[str, Any]]:
    """Return the tree of plain values that ``from_mapping`` takes back."""
    tree: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for section, leaf, value in _leaves(config):
        tree[section][leaf.name] = _plain(value)
    return tree


def _plain(value: Any) -> Any:
    """Return a setting as YAML has it."""
    if isinstance(value, WorkerRange):
        return value.plain
    return list(value) if isinstance(value, tuple) else value


def with_settings(config: Config, values: Mapping[str, Any]) -> Config:
    """Return ``config`` with the named settings replaced; unknown names and wrong values raise."""
    known = settings()
    unknown = [
        f"unknown setting {name!r}{near(name, known)}" for name in values if name not in known
    ]
    if unknown:
        raise ConfigError("\n".join(unknown))
    tree = to_mapping(config)
    for name, value in values.items():
        tree[known[name][0]][name] = value
    return from_mapping(tree)


def given(config: Config) -> set[str]:
    """Return the names of the settings that are not what they are by default."""
    tree: dict[str, Any] = {"data": {"dataset": config.data.dataset}}
    models = from_mapping(tree).model
    tree["model"] = {"student": config.model.student, "teacher": config.model.teacher}
    leaves = zip(_leaves(config), _leaves(from_mapping(tree)), strict=True)
    names = {leaf.name for (_, leaf, value), (_, _, default) in leaves if value != default}
    return names | {name for name in tree["model"] if tree["model"][name] != getattr(models, name)}
