"""What a comparison trains: methods, or the parts and settings of ours one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raygkd.assembly.methods import matches_graphs, suits
from raygkd.config import Config
from raygkd.registry import METHODS

# settings of one variant: name -> value
Settings = dict[str, Any]


def variants(config: Config, task: str, channels: Mapping[int, int]) -> dict[str, Settings]:
    """Return name -> settings of what is compared, in the order given.

    Args:
        config: of the comparison.
        task: of the images, "classification" or "detection".
        channels: level -> the teacher's channels, of the levels that both models have.
    """
    if config.compare.preset == "ablation":
        return ablation(config, task, channels)
    methods = config.compare.methods or tuple(name for name in METHODS.names() if suits(name, task))
    return {name: {"method": name} for name in methods}


def is_baseline(settings: Mapping[str, Any]) -> bool:
    """Return whether a variant is somebody else's method, or none."""
    return not matches_graphs(settings["method"])


def ablation(config: Config, task: str, channels: Mapping[int, int]) -> dict[str, Settings]:
    """Return our method as it is set, and with one thing changed at a time.

    First the student alone and our method; then the terms vertex (V), edge (E) and spectral (S)
    alone and in pairs; then other forms of the spectral loss, of the relational attention and of
    the adapters, levels, temperatures, dimensions, and maps with and without their channels' means.

    Args:
        config: of the comparison; what is not changed is as it says.
        task: of the images.
        channels: level -> the teacher's channels, of the levels that both models have.
    """
    method = config.method
    weights = {"V": "alpha", "E": "beta", "S": "gamma"}
    changes: dict[str, Settings] = {"graph": {}}
    if suits("kd", task):
        changes["graph+kd"] = {"method": "graph+kd"}
    for kept in ("V", "E", "S", "VE", "VS", "ES"):
        off = {setting: 0.0 for term, setting in weights.items() if term not in kept}
        changes["+".join(kept)] = off
    levels = sorted(method.levels or channels)
    others: dict[str, tuple[Any, ...]] = {
        "spectral_mode": ("residual", "subspace", "procrustes"),
        "weights": ("shifted", "cosine"),
        "attention": ("outer", "softmax"),
        "adapter": ("plain", "normalised"),
        "centre": (False, True),
        "levels": (*((level,) for level in levels), *([tuple(levels[1:])] if levels[2:] else [])),
        "temperature": tuple(method.temperature * factor for factor in (0.2, 5.0)),
        "dim": tuple(dim for dim in (1, 2, 4, 8, 16, 32) if dim < min(channels.values())),
    }
    for name, values in others.items():
        own = getattr(method, name)
        changes |= {f"{name} {_short(value)}": {name: value} for value in values if value != own}
    none = {"none": {"method": "none", "inherit": False}}
    return none | {name: {"method": "graph", **change} for name, change in changes.items()}


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value).lower()
