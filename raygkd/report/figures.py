"""Results as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
