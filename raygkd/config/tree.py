"""The settings of a run as one tree, and its conversion from and to plain values.

All problems are collected and raised at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from raygkd.config.defaults import dependent_defaults
from raygkd.config.schema import (
    OTHER_NAMES,
    REGISTRIES,
    SECTIONS,
    ClusterConfig,
    DataConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    OutputConfig,
    RecipeConfig,
    registered_settings,
    settings,
)
from raygkd.config.search import CompareConfig, SearchConfig, TrainConfig
from raygkd.config.validation import check_together, check_value
from raygkd.config.values import coerce, plain
from raygkd.errors import ConfigError, brief, near
from raygkd.registry import entry_name


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run; a ConfigError at construction lists every problem, a line each."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)

    def __post_init__(self) -> None:
        problems = [
            problem
            for _, leaf, value in _leaves(self)
            for problem in check_value(leaf.name, leaf, value)
        ]
        known = registered_settings() if (own := own_values(self)) else {}
        for name, value in own.items():
            problems += check_value(name, known[name][1], value)
        problems += check_together(
            data=self.data,
            method=self.method,
            optim=self.optim,
            recipe=self.recipe,
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
            if leaf.metadata:
                yield section, leaf, getattr(part, leaf.name)


def own_values(config: Config) -> dict[str, Any]:
    """Return the explicitly set settings of registered entries: METHOD.SETTING -> value."""
    return {
        name: value
        for section in REGISTRIES
        for name, value in getattr(config, section).own.items()
    }


def given_of_entries(config: Config) -> dict[str, Any]:
    """Return the explicitly set METHOD.SETTING and DATASET.OPTION of the chosen entries."""
    chosen = (config.method.method, entry_name(config.data.dataset))
    return {
        name: value
        for name, value in own_values(config).items()
        if name.rpartition(".")[0] in chosen
    }


def owned_by(owner: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return setting -> value of those values whose name is OWNER.SETTING."""
    return {
        setting: value
        for name, value in values.items()
        for of, _, setting in [name.rpartition(".")]
        if of == owner
    }


def value_of(config: Config, name: str) -> Any:
    """Return the value of a setting; for METHOD.SETTING, its default if it is not set."""
    section, leaf, _ = settings()[name]
    part = getattr(config, section)
    return part.own.get(name, leaf.default) if "." in name else getattr(part, name)


def check_keys(tree: Mapping[str, Any], *, where: str) -> None:
    """Raise one ConfigError for all unknown sections and settings, with similar names.

    Args:
        tree: section -> setting -> value.
        where: the file, for error messages.
    """
    problems = _key_problems(plain_names(tree), where)
    if problems:
        raise ConfigError("\n".join(problems))


def plain_names(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree whose settings have the names in ``settings``.

    ``{dkd: {beta: 8}}`` in a section becomes ``{"dkd.beta": 8}``, and a setting with its own
    command-line option gets that name ("graph.alpha" becomes "alpha").

    Raises:
        ConfigError: a setting is given by both of its names.
    """
    named: dict[str, Any] = {}
    for section, leaves in tree.items():
        if section not in REGISTRIES or not isinstance(leaves, Mapping):
            named[section] = leaves
            continue
        flat: dict[str, Any] = {}
        for name, value in leaves.items():
            if isinstance(value, Mapping):
                flat |= {f"{name}.{leaf}": inner for leaf, inner in value.items()}
            else:
                flat[name] = value
        for name in flat.keys() & OTHER_NAMES.keys():
            if OTHER_NAMES[name] in flat:
                raise ConfigError(
                    f"{name} and {OTHER_NAMES[name]} are the same setting; use only one of them"
                )
        named[section] = {OTHER_NAMES.get(name, name): value for name, value in flat.items()}
    return named


def _key_problems(tree: Mapping[str, Any], where: str) -> list[str]:
    problems: list[str] = []
    known = settings()
    for section, leaves in tree.items():
        if section not in SECTIONS:
            hint = near(str(section), [*SECTIONS, *known])
            if section in known:
                hint = f" (it belongs under '{known[section][0]}:')"
            sections = ", ".join(SECTIONS)
            problems.append(f"{where}: unknown key {brief(section)}{hint} (sections: {sections})")
        elif not isinstance(leaves, Mapping):
            problems.append(f"{where}: {section!r} must contain settings, not {brief(leaves)}")
        else:
            problems += [
                f"{where}: unknown key '{section}.{brief(name, quoted=False)}'"
                f"{_key_hint(section, str(name))}"
                for name in leaves
                if name not in known or known[name][0] != section
            ]
    return problems


def _key_hint(section: str, name: str) -> str:
    """Return what an unknown key of a section may mean, and where it belongs."""
    known = settings()
    plain = [own for own, (place, _, _) in known.items() if place == section and "." not in own]
    allowed = f"{section!r} takes {', '.join(plain)}"
    if name in known:
        return f" (it belongs under '{known[name][0]}:'; {allowed})"
    return near(name, [own for own in known if known[own][0] == section]) or f" ({allowed})"


def from_mapping(tree: Mapping[str, Any], *, where: str = "configuration") -> Config:
    """Build a Config from a tree of plain values, such as YAML.

    Args:
        tree: section -> setting -> value. Missing settings get their defaults, some of which depend
            on the recipe or the data set (``dataset_defaults``) or are different for detectors.
        where: the file, for error messages.

    Raises:
        ConfigError: a section or setting is unknown, or a value is not allowed; lists all problems,
            one per line.
    """
    tree = plain_names(tree)
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
            value = coerce(name, kind, leaves[name])
        except ConfigError as error:
            problems.append(f"{where}: {error}")
            continue
        beyond_limits += check_value(name, leaf, value)
        if "." in name:
            parts[section].setdefault("own", {})[name] = value
        else:
            parts[section][name] = value
    if problems:
        # skip checks between settings, which would refer to defaults instead of the wrong values
        raise ConfigError("\n".join(problems + beyond_limits))
    return Config(**{section: SECTIONS[section](**leaves) for section, leaves in parts.items()})


def to_mapping(config: Config) -> dict[str, dict[str, Any]]:
    """Return the tree of plain values, the inverse of ``from_mapping``."""
    tree: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for section, leaf, value in _leaves(config):
        tree[section][leaf.name] = plain(value)
    for section in REGISTRIES:
        for name, value in getattr(config, section).own.items():
            owner, _, setting = name.rpartition(".")
            tree[section].setdefault(owner, {})[setting] = plain(value)
    return tree


def with_settings(config: Config, values: Mapping[str, Any]) -> Config:
    """Return ``config`` with some settings replaced; unknown names and wrong values raise."""
    known = settings()
    values = {OTHER_NAMES.get(name, name): value for name, value in values.items()}
    unknown = [
        f"unknown setting {name!r}{near(name, known)}" for name in values if name not in known
    ]
    if unknown:
        raise ConfigError("\n".join(unknown))
    tree = plain_names(to_mapping(config))
    for name, value in values.items():
        tree[known[name][0]][name] = value
    return from_mapping(tree)


def given(config: Config) -> set[str]:
    """Return the names of the settings that differ from their defaults, those of its recipe."""
    tree: dict[str, Any] = {"data": {"dataset": config.data.dataset}}
    models = from_mapping(tree).model
    tree["model"] = {"student": config.model.student, "teacher": config.model.teacher}
    tree["recipe"] = {"recipe": config.recipe.recipe}
    leaves = zip(_leaves(config), _leaves(from_mapping(tree)), strict=True)
    names = {leaf.name for (_, leaf, value), (_, _, default) in leaves if value != default}
    known = registered_settings()
    names |= {name for name, value in own_values(config).items() if value != known[name][1].default}
    names |= {name for name in tree["model"] if tree["model"][name] != getattr(models, name)}
    return names | ({"recipe"} if config.recipe.recipe != RecipeConfig.recipe else set())
