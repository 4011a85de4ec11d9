"""Results of measurements, and whether they meet their targets."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from raygkd.metrics.latency import cpu_name
from raygkd.version import __version__

_PACKAGES = ("torch", "torchvision", "numpy", "ray", "mlflow")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement and its target.

    Attributes:
        what: what was measured.
        against: what it is compared with; empty for an absolute value.
        value: the result.
        unit: "x" for a ratio, "%", "s" or "points".
        bound: the target, an upper or lower limit.
        at_least: whether the target is a lower limit.
        configuration: settings, and the results of both sides.
    """

    what: str
    against: str
    value: float
    unit: str
    bound: float
    at_least: bool = False
    configuration: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_met(self) -> bool:
        """Whether the target is met; NaN never meets it."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    @property
    def verdict(self) -> str:
        """Return "met" or "missed"."""
        return "met" if self.is_met else "missed"

    def as_json(self) -> dict[str, Any]:
        """Return plain values for ``--json``."""
        return {**asdict(self), "verdict": self.verdict}


def machine() -> dict[str, Any]:
    """Return hardware and versions, as far as packages are installed."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "raygkd": __version__,
        **versions,
    }


def report(rows: Sequence[Row], *, as_json: bool) -> str:
    """Return rows and machine as they are printed: one JSON object, or a table."""
    if as_json:
        return json.dumps({"machine": machine(), "rows": [row.as_json() for row in rows]})
    return text_table(rows, machine())


def text_table(rows: Sequence[Row], machine: Mapping[str, Any]) -> str:
    """Return rows and machine as text for a terminal; it needs no other package."""
    cells = [("what", "against", "figure", "target", ""), *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    missed = sum(not row.is_met for row in rows)
    facts = ", ".join(f"{name} {value}" for name, value in machine.items() if value is not None)
    return "\n".join([*lines, "", f"{len(rows) - missed} met, {missed} missed; {facts}"])


def _cells(row: Row) -> tuple[str, str, str, str, str]:
    bound = f"{'>=' if row.at_least else '<='} {_number(row.bound, row.unit)}"
    return row.what, row.against, _number(row.value, row.unit), bound, row.verdict


def _number(value: float, unit: str) -> str:
    text = f"{value:.0f}" if abs(value) >= 99.5 else f"{value:.3g}"
    return f"{text}{unit}" if unit in ("x", "%") else f"{text} {unit}"


Rows = Iterator[Row]
