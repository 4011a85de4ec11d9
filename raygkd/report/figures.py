"""Figures: shared helpers, and the figure of a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raygkd.storage.atomic_files import Place, whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS_PER_INCH = 150
# inches: what a page shows without making it smaller
WIDTH = 7.5
# told apart by every kind of colour vision (Okabe and Ito, "Color universal design")
BLUE, ORANGE, GREEN, VERMILION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
PURPLE, SKY = "#cc79a7", "#56b4e9"
INK, FAINT, PALE = "0.15", "0.55", "0.8"
# lightness falls with the score, for every kind of colour vision alike: the best stand out on white
SCORES = "viridis_r"
# how a trial ended -> colour and mark of its last epoch
_ENDS = {
    "finished": (FAINT, "o"),
    "stopped": (PALE, "s"),
    "diverged": (VERMILION, "x"),
    "failed": (VERMILION, "x"),
}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One trial's validation score over its epochs.

    Attributes:
        status: how it ended, as in ``TrialResult``.
        scores: epoch (from 1) -> score.
    """

    status: str
    scores: Mapping[int, float]


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """Return an empty figure of a size in inches, with constrained layout."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def plain(axes: Axes, *, grid: str = "y") -> None:
    """Remove unneeded parts of axes, and draw a faint grid of "x", "y" or "both"."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="0.92")  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def save(figure: Figure, path: Place) -> None:
    """Write a PNG, atomically."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DOTS_PER_INCH)


def whole_epochs(axes: Axes) -> None:
    """Label the x axis with epochs, as whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_search(
    path: Place,
    curves: Sequence[Curve],
    others: Mapping[str, float],
    rungs: Sequence[int] = (),
) -> None:
    """Write a PNG of all trials of a search, atomically.

    Args:
        path: of the picture.
        curves: the trials, best first.
        others: baseline -> its validation score, drawn as a horizontal line.
        rungs: epochs after which the scheduler stops trials, drawn as vertical lines.
    """
    figure = new_figure(4.6)
    axes = figure.add_subplot(ylabel="validation score", title=f"Search of {len(curves)} trials")
    whole_epochs(axes)
    plain(axes)
    for rung in rungs:
        axes.axvline(rung, color=SKY, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    for rank, curve in reversed(list(enumerate(curves, start=1))):
        _draw_trial(axes, curve, is_best=rank == 1)
    for number, (name, score) in enumerate(others.items()):
        style = ("--", ":")[number % 2]
        axes.axhline(
            score, color="black", linewidth=1.2, linestyle=style, label=f"{name} {score:.3f}"
        )
    axes.plot([], [], color=BLUE, linewidth=3, marker="o", label="best")
    statuses = {curve.status for curve in curves}
    for status in (name for name in _ENDS if name in statuses):
        color, mark = _ENDS[status]
        axes.plot([], [], color=color, marker=mark, label=status)
    if rungs:
        axes.plot([], [], color=SKY, linewidth=1, linestyle=(0, (4, 3)), label="rung")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    save(figure, path)


def _draw_trial(axes: Axes, curve: Curve, *, is_best: bool) -> None:
    color, mark = _ENDS[curve.status]
    epochs = sorted(curve.scores)
    scores = [curve.scores[epoch] for epoch in epochs]
    style = {"color": BLUE, "linewidth": 3.0} if is_best else {"color": color}
    axes.plot(epochs, scores, marker=mark, markevery=[-1] if epochs else None, **style)
