"""Pictures of an evaluation: confusion matrices and reliability diagrams.

Shapes: K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raygkd.report.figures import BLUE, FAINT, GREEN, INK, ORANGE, PURPLE, new_figure, plain, save

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, INK)
# classes at most whose counts and names can be read
MOST_COUNTS, MOST_NAMES = 12, 60


def draw_confusion(
    path: Path, class_names: Sequence[str], confusion: Sequence[Sequence[int]], *, title: str
) -> None:
    """Write a PNG of a confusion matrix, atomically.

    Args:
        path: of the picture.
        class_names: K of them.
        confusion: K lists of K counts, one list per true class.
        title: above it.
    """
    counts_KK = np.array(confusion)
    of_class_K1 = counts_KK.sum(axis=1, keepdims=True)
    shares_KK = counts_KK / np.maximum(of_class_K1, 1)
    classes = len(class_names)
    side = float(np.clip(2.5 + 0.35 * classes, 4.0, 12.0))
    figure = new_figure(side, side + 0.8)
    axes = figure.add_subplot(title=title, xlabel="predicted class", ylabel="true class")
    shown = axes.imshow(shares_KK, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(shown, ax=axes, label="fraction of the images of the true class", shrink=0.8)
    if classes <= MOST_NAMES:
        axes.set_xticks(range(classes), class_names, rotation=90)
        axes.set_yticks(range(classes), class_names)
    if classes <= MOST_COUNTS:
        for row, column in np.argwhere(counts_KK > 0).tolist():
            colour = "white" if shares_KK[row, column] > 0.5 else INK
            count = str(counts_KK[row, column])
            axes.text(column, row, count, ha="center", va="center", color=colour)
    save(figure, path)


def draw_reliability(path: Path, models: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a PNG of a reliability diagram (accuracy against confidence), atomically.

    Args:
        path: of the picture.
        models: name of the model in the legend -> result of ``calibration``.
    """
    figure = new_figure(5.0, 6.0)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.set(ylabel="fraction correct", xlim=(0, 1), ylim=(0, 1))
    below.set(xlabel="confidence", ylabel="answers")
    above.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    for number, (name, of) in enumerate(models.items()):
        colour = COLOURS[number % len(COLOURS)]
        error = "-" if of["ece"] is None else f"{of['ece']:.3f}"
        confidence = [one["confidence"] for one in of["bins"]]
        right = [one["right"] for one in of["bins"]]
        above.plot(confidence, right, color=colour, marker="o", label=f"{name} (error {error})")
        counts = [one["count"] for one in of["bins"]]
        below.plot(confidence, counts, color=colour, marker="o", markersize=3)
    for axes in (above, below):
        plain(axes, grid="both")
    figure.legend(loc="outside upper center", frameon=False)
    save(figure, path)
