"""Results as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raygkd.files import Place, whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOTS_PER_INCH = 150
# how a trial ended -> colour and mark of its last epoch
_ENDS = {
    "finished": ("tab:blue", "o"),
    "stopped": ("0.65", "s"),
    "diverged": ("tab:red", "x"),
    "failed": ("tab:red", "x"),
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


def draw_search(path: Place, curves: Sequence[Curve], others: Mapping[str, float]) -> None:
    """Write a PNG of all trials of a search; it appears whole or not at all.

    Args:
        path: of the picture.
        curves: the trials, best first.
        others: what they are compared with -> its validation score, drawn as a level line.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="epoch", ylabel="validation score", title=f"Search of {len(curves)} trials"
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    for rank, curve in reversed(list(enumerate(curves, start=1))):
        _draw_trial(axes, curve, is_best=rank == 1)
    for number, (name, score) in enumerate(others.items()):
        axes.axhline(score, color="black", linewidth=1, linestyle=("--", ":")[number % 2])
        axes.annotate(
            f"{name} {score:.3f}",
            (0.0, score),
            xycoords=("axes fraction", "data"),
            xytext=(4, 3),
            textcoords="offset points",
            fontsize="small",
        )
    statuses = {curve.status for curve in curves}
    for status in (name for name in _ENDS if name in statuses):
        color, mark = _ENDS[status]
        axes.plot([], [], color=color, marker=mark, label=status)
    axes.plot([], [], color="tab:orange", linewidth=3, marker="o", label="best")
    axes.legend(loc="lower right", frameon=False)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DOTS_PER_INCH)


def _draw_trial(axes: Axes, curve: Curve, *, is_best: bool) -> None:
    color, mark = _ENDS[curve.status]
    epochs = sorted(curve.scores)
    scores = [curve.scores[epoch] for epoch in epochs]
    style = {"color": "tab:orange", "linewidth": 3.0} if is_best else {"color": color}
    axes.plot(epochs, scores, marker=mark, markevery=[-1] if epochs else None, **style)


def draw_comparison(path: Place, comparison: Mapping[str, Any]) -> None:
    """Write a PNG of what methods score: a dot for each seed, and a bar for their mean.

    Args:
        path: of the picture; it appears whole or not at all.
        comparison: "metric", "reference" and "methods", best first, each with "method", "scores"
            and "mean".
    """
    from matplotlib.figure import Figure

    methods = comparison["methods"]
    figure = Figure(figsize=(8, 1.2 + 0.32 * len(methods)), layout="constrained")
    axes = figure.add_subplot(
        xlabel=f"{comparison['metric']} on the test split",
        title=f"{len(methods)} methods, {len(comparison['seeds'])} seeds each",
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    for place, one in enumerate(methods):
        color = "tab:orange" if one["method"].startswith("graph") else "tab:blue"
        scores = [score for score in one["scores"] if score is not None]
        axes.plot(scores, [place] * len(scores), "o", color=color, alpha=0.6)
        if one["mean"] is not None:
            axes.plot([one["mean"]] * 2, [place - 0.35, place + 0.35], color=color, linewidth=3)
        if one["method"] == comparison["reference"] and one["mean"] is not None:
            axes.axvline(one["mean"], color="black", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(methods)), [one["method"] for one in methods])
    axes.invert_yaxis()
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DOTS_PER_INCH)
