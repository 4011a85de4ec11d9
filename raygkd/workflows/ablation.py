"""The variants that a comparison trains: methods, or parts of the graph method one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raygkd.assembly.methods import matches_graphs, reads_logits, scores_teacher, suits
from raygkd.config import Config, plain
from raygkd.losses import reads_labels
from raygkd.registry import METHODS

# settings of one variant: name -> value
Settings = dict[str, Any]


def variants(
    config: Config, task: str, channels: Mapping[int, int], *, has_unlabelled: bool = False
) -> dict[str, Settings]:
    """Return name -> settings of each variant to compare, in the given order.

    Args:
        config: of the comparison.
        task: of the images, "classification" or "detection".
        channels: level -> the teacher's channels, of the levels that both models have.
        has_unlabelled: some images have no labels, which some methods read.
    """
    if config.compare.preset == "ablation":
        return ablation(config, task, channels)
    methods = config.compare.methods or tuple(
        name
        for name in METHODS.names()
        if suits(name, task)
        and (scores_teacher(config) or not reads_logits(name))
        and not (has_unlabelled and reads_labels(name))
    )
    return {name: {"method": name} for name in methods}


def is_baseline(settings: Mapping[str, Any]) -> bool:
    """Return whether a variant is a baseline: another method, or none."""
    return not matches_graphs(settings["method"])


def ablation(config: Config, task: str, channels: Mapping[int, int]) -> dict[str, Settings]:
    """Return variants of the graph method, each with one setting changed.

    First the student alone and our method; then the terms vertex (V), edge (E) and spectral (S)
    alone and together, those that the method leaves out at a weight of 1; then graphs of each
    image, other forms of the adapters, levels, temperatures, dimensions, and maps with and without
    their channels' means.

    Args:
        config: of the comparison; gives all settings that are not changed.
        task: of the images.
        channels: level -> the teacher's channels, of the levels that both models have.
    """
    method = config.method
    weights = {"V": "alpha", "E": "beta", "S": "gamma"}
    changes: dict[str, Settings] = {"graph": {}}
    if suits("kd", task) and scores_teacher(config):
        changes |= {name: {"method": name} for name in ("graph+kd", "graph+dist")}
    for kept in ("V", "E", "S", "VE", "VS", "ES", "VES"):
        terms = {
            setting: (getattr(method, setting) or 1.0) if term in kept else 0.0
            for term, setting in weights.items()
        }
        if terms != {setting: getattr(method, setting) for setting in weights.values()}:
            changes["+".join(kept)] = terms
    all_terms = {setting: getattr(method, setting) or 1.0 for setting in weights.values()}
    changes |= {
        f"V+E+S, graphs image, {mode}": {**all_terms, "graphs": "image", "spectral_mode": mode}
        for mode in ("residual", "subspace", "procrustes")
    }
    levels = [pair.plain for pair in method.levels] if method.levels else sorted(channels)
    others: dict[str, tuple[Any, ...]] = {
        "adapter": ("plain", "normalised"),
        "centre": (False, True),
        "levels": (*((level,) for level in levels), *([tuple(levels[1:])] if levels[2:] else [])),
        "temperature": tuple(method.temperature * factor for factor in (0.2, 5.0)),
    }
    for name, values in others.items():
        own = plain(getattr(method, name))
        changes |= {
            f"{name} {_short(value)}": {name: value} for value in values if plain(value) != own
        }
    dims = [dim for dim in (1, 2, 4, 8, 16, 32) if dim < min(channels.values())]
    changes |= {f"V+E+S, dim {dim}": {**all_terms, "dim": dim} for dim in dims if dim != method.dim}
    none = {"none": {"method": "none", "inherit": False}}
    return none | {name: {"method": "graph", **change} for name, change in changes.items()}


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value).lower()
