"""The search space: the settings that a search varies, and how they are drawn."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raygkd.config.schema import OTHER_NAMES, SECTIONS, OptimConfig, registered_settings, settings
from raygkd.config.tree import Config, owned_by, value_of, with_settings
from raygkd.config.values import LevelPair, base_type, coerce, plain
from raygkd.config.yaml_text import read_yaml
from raygkd.errors import ConfigError, brief, near
from raygkd.registry import METHODS

KINDS = {
    "choice": "a list of values",
    "uniform": "[low, high]",
    "loguniform": "[low, high], both above 0",
    "randint": "[low, high], high excluded",
}
_KINDS_OF_TYPE = {int: ("choice", "randint"), float: ("choice", "uniform", "loguniform")}
# ASHA decides on epochs, a recipe only gives defaults, and the others change the cost of a run but
# not its results
_FIXED = {"epochs", "seed", "amp", "compile", "weights_unit", "recipe"}
# settings that decide which others a trial has, in the order in which they are drawn
DECISIVE = ("student", "method", "teacher", "image_size")
# searched settings of sections whose others describe the run
OF_RUN = ("student", "teacher", "image_size", "augment")

# Centred on good values, see docs/benchmarks/results.md. Edges and spectrum add little to vertices
# and may be omitted; a sharp attention does harm.
_GRAPH = {
    "gradient": (
        ("temperature", "loguniform", (5.0, 100.0)),
        ("alpha", "loguniform", (1.0, 10.0)),
        ("beta", "choice", (0.0, 0.3, 1.0)),
        ("gamma", "choice", (0.0, 0.3, 1.0)),
    ),
    "loss": (
        ("temperature", "loguniform", (1.0, 20.0)),
        ("alpha", "loguniform", (3.0, 300.0)),
        ("beta", "loguniform", (1.0, 100.0)),
        ("gamma", "loguniform", (0.1, 10.0)),
    ),
}
# weight of a baseline, as a share of the labels' gradient
_SHARES = (0.3, 10.0)


@dataclass(frozen=True)
class Dimension:
    """One searched setting.

    Attributes:
        name: name of the setting.
        kind: distribution, one of KINDS.
        values: the choices, or low and high.
        when: values of ``DECISIVE`` settings, one set of them for each case in which the setting is
            drawn; empty if it always is.
    """

    name: str
    kind: str
    values: tuple[Any, ...]
    when: tuple[tuple[tuple[str, Any], ...], ...] = ()

    def applies(self, params: Mapping[str, Any]) -> bool:
        """Return whether a trial with these decisive settings has the setting."""
        return not self.when or any(
            all(params.get(name) == value for name, value in case) for case in self.when
        )


def searchable() -> list[str]:
    """Return the settings that a search may vary."""
    return [
        name
        for name, (section, _, _) in settings().items()
        if (section in ("method", "optim", "recipe") or name in OF_RUN) and name not in _FIXED
    ]


def default_space(
    method: str,
    channels: Mapping[int, int],
    *,
    lr: float = OptimConfig.lr,
    detection: bool = False,
    weights_unit: str = "gradient",
    fixed: Collection[str] = (),
) -> tuple[Dimension, ...]:
    """Return the space that is searched unless ``--space`` replaces it.

    Args:
        method: the distillation method.
        channels: level -> the teacher's channels, for the levels that can be matched.
        lr: learning rate without a search; the search range is around it.
        detection: whether the models are detectors.
        weights_unit: unit of the weights, "gradient" or "loss".
        fixed: settings that are not searched.
    """
    around = (float(f"{0.4 * lr:.3g}"), float(f"{4 * lr:.3g}"))
    space = [Dimension("lr", "loguniform", around)]
    if METHODS.get(method).matches_graphs:
        subsets = _level_subsets(sorted(channels), detection=detection)
        narrowest = min(channels.values(), default=2)
        dims = [2**power for power in range(1, 7) if 2**power < narrowest] or [1]
        space += [
            Dimension("levels", "choice", tuple(list(subset) for subset in subsets)),
            Dimension("dim", "choice", tuple(dims)),
            *(Dimension(*entry) for entry in _GRAPH[weights_unit]),
        ]
    # torch takes seconds to import, and to read a file does not need it
    from raygkd.losses import baseline_class, baseline_of

    baseline = baseline_of(method)
    if baseline == "kd":
        space += [
            Dimension("kd_temperature", "uniform", (2.0, 8.0)),
            Dimension("kd_weight", "uniform", (0.3, 0.95)),
        ]
    elif baseline is not None:
        weight = baseline_class(baseline).weight
        around = _SHARES if weights_unit == "gradient" else (weight / 10, weight * 10)
        space += [Dimension("baseline_weight", "loguniform", around)]
    # a baseline that another method uses keeps the settings of its own name
    space += [
        _dimension(f"{owner}.{name}", {kind: list(values)})
        for owner in dict.fromkeys((method, baseline or method))
        for name, (_, leaf, _) in owned_by(owner, registered_settings()).items()
        for kind, values in (leaf.metadata["search"] or {}).items()
    ]
    if method == "none":
        space += [Dimension("weight_decay", "loguniform", (1e-5, 5e-3))]
    return tuple(dimension for dimension in space if dimension.name not in fixed)


def _level_subsets(levels: list[int], *, detection: bool) -> list[tuple[int, ...]]:
    """Return the sets of levels to try.

    They are the subsets of up to four levels that have two or more: a level by itself lost a half
    to all of the gain. With more levels, they are the deepest levels of a classifier, or the finest
    levels of a pyramid, whose coarsest maps have few positions.
    """
    sizes = range(min(2, len(levels)), len(levels) + 1)
    if len(levels) <= 4:
        return [subset for size in sizes for subset in itertools.combinations(levels, size)]
    return [tuple(levels[:size] if detection else levels[-size:]) for size in sizes]


def default_settings(
    space: Sequence[Dimension], config: Config, channels: Mapping[int, int]
) -> dict[str, Any]:
    """Return the values that the settings of a space have without a search.

    Args:
        space: the searched settings.
        config: what the settings are.
        channels: level -> the teacher's channels, of the levels that both models have; they take
            the place of no levels, and limit the spectral dimension.
    """
    values = {}
    for dimension in space:
        value = value_of(config, dimension.name)
        if dimension.name == "levels" and value is None and channels:
            value = sorted(channels)
        elif dimension.name == "dim":
            value = min(value, max(extremes(dimension)))
        values[dimension.name] = plain(value)
    return values


def in_space(params: Mapping[str, Any], space: Sequence[Dimension]) -> bool:
    """Return whether settings could have been drawn from a space."""
    space = [dimension for dimension in space if dimension.applies(params)]
    return params.keys() == {dimension.name for dimension in space} and all(
        _has(dimension, params[dimension.name]) for dimension in space
    )


def _has(dimension: Dimension, value: Any) -> bool:
    if dimension.kind == "choice":
        return value in dimension.values
    low, high = min(extremes(dimension)), max(extremes(dimension))
    return value is not None and low <= value <= high


def read_space(path: str) -> tuple[Dimension, ...]:
    """Return the space of a YAML file: ``name: {kind: values}``.

    Raises:
        ConfigError: the file cannot be read or is invalid; lists all problems.
    """
    problems: list[str] = []
    space = []
    for name, entry in read_yaml(path, option="--space").items():
        try:
            space.append(_dimension(name, entry))
        except ConfigError as error:
            problems.append(f"{path}: {error}")
    if not space and not problems:
        problems.append(f"{path}: has no settings (allowed: {', '.join(searchable())})")
    if problems:
        raise ConfigError("\n".join(problems))
    return tuple(space)


def _dimension(name: Any, entry: Any) -> Dimension:
    """Return one entry of a space file; raise ConfigError if it is invalid."""
    known = searchable()
    name = OTHER_NAMES.get(name, name)
    if name not in known:
        hint = near(str(name), known)
        if name in SECTIONS and name not in _FIXED:
            raise ConfigError(f"{name!r}: a search space has no sections; list its settings alone")
        raise ConfigError(f"{brief(name)} cannot be searched{hint} (allowed: {', '.join(known)})")
    setting = settings()[name][2]
    kinds = (
        _KINDS_OF_TYPE.get(base_type(setting), ("choice",)) if name not in DECISIVE else ("choice",)
    )
    if not isinstance(entry, dict) or len(entry) != 1 or next(iter(entry)) not in kinds:
        forms = "; ".join(f"{kind}: {KINDS[kind]}" for kind in kinds)
        raise ConfigError(f"{name}: must be one of {{{forms}}}, not {brief(entry)}")
    ((kind, given),) = entry.items()
    if not isinstance(given, list) or not given:
        raise ConfigError(f"{name}: {kind} takes {KINDS[kind]}, not {brief(given)}")
    values = tuple(coerce(name, setting, value) for value in given)
    if kind != "choice" and (len(values) != 2 or None in values or not values[0] < values[1]):
        raise ConfigError(
            f"{name}: {kind} takes {KINDS[kind]} with low below high, not {brief(given)}"
        )
    if kind == "loguniform" and values[0] <= 0:
        raise ConfigError(f"{name}: loguniform takes {KINDS[kind]}, not {brief(given)}")
    return Dimension(name, kind, tuple(plain(value) for value in values))


def check_space(space: Sequence[Dimension], config: Config, channels: Mapping[int, int]) -> None:
    """Check that every trial of a search space can run.

    Args:
        space: the searched settings.
        config: the other settings.
        channels: level -> the teacher's channels, for the levels that both models have.

    Raises:
        ConfigError: a value is not allowed, a level does not exist, or the spectral dimension is
            too large for a level.
    """
    by_name = {dimension.name: dimension for dimension in space}
    # the only mistake that depends on several searched settings: all weights 0
    weights = [by_name[name] for name in ("alpha", "beta", "gamma") if name in by_name]
    largest = {d.name: max(extremes(d)) for d in weights}
    drawn = [
        {**(largest if dimension in weights else {}), dimension.name: value}
        for dimension in space
        for value in extremes(dimension)
    ]
    zeros = {d.name: 0.0 for d in weights if d.kind == "choice" and 0.0 in d.values}
    drawn += [{**largest, **zeros}]
    problems: list[str] = []
    wrong: set[str] = set()
    for values in drawn:
        try:
            with_settings(config, values)
        except ConfigError as error:
            problems.append(f"search space: {error}")
            wrong |= values.keys()
    if channels and not wrong & {"levels", "dim"}:
        problems += level_problems(by_name, config, channels)
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))


def extremes(dimension: Dimension) -> tuple[Any, ...]:
    """Return the choices, or the smallest and largest value that can be drawn."""
    if dimension.kind == "randint":
        return dimension.values[0], dimension.values[1] - 1
    return dimension.values


def level_problems(
    space: Mapping[str, Dimension], config: Config, channels: Mapping[int, int]
) -> list[str]:
    """Return what is wrong with levels and spectral dimension.

    Args:
        space: name -> searched setting.
        config: what the other settings are.
        channels: level -> the teacher's channels, of the levels that both models have.
    """
    given = space["levels"].values if "levels" in space else (plain(config.method.levels),)
    levels = {
        LevelPair.parse(level).student
        for subset in given
        for level in (subset if subset is not None else channels)
    }
    unknown = sorted(levels - set(channels))
    if unknown:
        allowed = ", ".join(map(str, sorted(channels)))
        where = "search space" if "levels" in space else "--levels"
        return [f"{where}: level {unknown[0]} does not exist (allowed: {allowed})"]
    dims = space["dim"] if "dim" in space else Dimension("dim", "choice", (config.method.dim,))
    largest = max(extremes(dims))
    narrow = min(levels, key=lambda level: channels[level])
    if largest >= channels[narrow]:
        return [
            f"--dim {largest}: the teacher's map at level {narrow} has {channels[narrow]} channels "
            f"(allowed: 1 to {channels[narrow] - 1})"
        ]
    return []
