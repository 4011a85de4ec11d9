"""Results as tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table


def show(value: Any) -> str:
    """Return a setting or score as short text."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value)


def trials_table(trials: Sequence[Mapping[str, Any]]) -> Table:
    """Return the trials of a search, best first."""
    names = list(trials[0]["params"]) if trials else []
    table = Table(title="Trials by validation score", title_justify="left")
    table.add_column("#", justify="right")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("epochs", "val score", "status"):
        table.add_column(name, justify="right", no_wrap=True)
    for rank, trial in enumerate(trials, start=1):
        settings = [show(trial["params"].get(name)) for name in names]
        score = "-" if trial["val_score"] is None else f"{trial['val_score']:.4f}"
        table.add_row(str(rank), *settings, str(trial["epochs"]), score, trial["status"])
    return table


def models_table(rows: Sequence[tuple[str, str, int, float]]) -> Table:
    """Return models side by side.

    Args:
        rows: (role, model, parameters, score on the test split).
    """
    table = Table(title="Models on the test split", title_justify="left")
    table.add_column("")
    table.add_column("model")
    for name in ("parameters", "size", "test score"):
        table.add_column(name, justify="right", no_wrap=True)
    largest = max(parameters for _, _, parameters, _ in rows)
    for role, model, parameters, score in rows:
        share = f"{100 * parameters / largest:.0f}%"
        table.add_row(role, model, f"{parameters:,}", share, f"{score:.4f}")
    return table


def levels_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the matched levels, as ``GraphDistillationLoss.describe`` gives them."""
    table = Table(title="Matched levels", title_justify="left")
    for name in ("level", "teacher C x H x W", "student C x H x W", "grid", "adapter", "pairs"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        shapes = [" x ".join(map(str, row[key])) for key in ("teacher_shape", "student_shape")]
        pairs = f"{row['spectral_pairs']} of {row['spectral_dim']}"
        grid = " x ".join(map(str, row["grid"]))
        table.add_row(str(row["level"]), *shapes, grid, row["adapter"], pairs)
    return table


def info_table(info: Mapping[str, Any]) -> Table:
    """Return what ``table_info`` found, a line a fact."""
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in info.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {show(part)}" for key, part in value.items())
        table.add_row(name.replace("_", " "), show(value))
    return table
