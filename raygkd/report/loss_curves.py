"""Report section on the loss terms over time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from raygkd.metrics.metric import registered_metrics
from raygkd.report.figures import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    VERMILION,
    new_figure,
    plain,
    save,
    whole_epochs,
)
from raygkd.report.page import Picture, Section

# term -> colour, mark, and what it compares
TERMS = {
    "task": ("black", "o", "the labels"),
    "kd": (PURPLE, "v", "the teacher's class scores"),
    "vertex": (BLUE, "s", "single channels of student and teacher"),
    "edge": (ORANGE, "^", "how alike pairs of channels are"),
    "spectral": (GREEN, "D", "the spectral embeddings of the channel graphs"),
    "graph-metrics": (VERMILION, "P", "metrics of the channels in their graphs"),
}
COLUMNS = 3


def losses_section(
    folder: Path, epochs: Sequence[Mapping[str, float]], weights: Mapping[str, float], whose: str
) -> Section:
    """Return the section on the loss terms, with its pictures drawn.

    Args:
        folder: for the pictures.
        epochs: metrics of each epoch, at least one.
        weights: loss term -> its weight in the sum.
        whose: name of the trained model in the text.
    """
    terms = {name: [epoch[f"loss_{name}"] for epoch in epochs] for name in weights}
    numbers = [int(epoch["epoch"]) for epoch in epochs]
    alone, together = folder / "losses.png", folder / "loss_shares.png"
    scores = {"validation score": [epoch["val_score"] for epoch in epochs]}
    for name, metric in registered_metrics().items():
        values = [epoch[f"val_{name}"] for epoch in epochs if f"val_{name}" in epoch]
        if len(values) == len(epochs) and values != scores["validation score"]:
            scores[metric.label()] = values
    draw_terms(alone, numbers, terms, scores)
    compared = "; ".join(f"{name}: {_colour(name)[2]}" for name in terms)
    blocks = [
        Picture(
            alone,
            f"Loss terms of {whose}",
            "Means over each epoch's training images, before their weights. The terms compare: "
            f"{compared}. Then, on the validation images: {', '.join(scores)}.",
        )
    ]
    if len(terms) > 1:
        draw_weighted(together, numbers, terms, weights)
        sums = " + ".join(f"{weight:.3g} {name}" for name, weight in weights.items())
        blocks.append(
            Picture(
                together,
                "Weighted loss terms",
                f"Training minimises {sums}. The axis is logarithmic: the highest line is the "
                "term with the largest contribution.",
            )
        )
    return Section(
        anchor="losses",
        title="Loss terms",
        blocks=blocks,
        numbers={"epochs": numbers, "weights": dict(weights), "terms": terms, "scores": scores},
    )


def draw_terms(
    path: Path,
    epochs: Sequence[int],
    terms: Mapping[str, Sequence[float]],
    scores: Mapping[str, Sequence[float]],
) -> None:
    """Write a PNG with a panel for each term, and one for each score.

    Args:
        path: of the picture.
        epochs: numbers of the epochs.
        terms: loss term -> its value in each epoch.
        scores: title -> values on the validation split after each epoch.
    """
    panels = {**terms, **scores}
    rows = math.ceil(len(panels) / COLUMNS)
    figure = new_figure(0.3 + 2.1 * rows)
    for number, (name, values) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, COLUMNS, number)
        plain(axes)
        colour, mark, _ = _colour(name)
        axes.plot(epochs, values, color=colour, marker=mark, markersize=4, markevery=_every(epochs))
        axes.set_title(name, fontsize=10, loc="left")
        axes.tick_params(labelsize=8)
        whole_epochs(axes)
        axes.set_ylim(0, 1.1 * max(values) or 1.0)
    save(figure, path)


def draw_weighted(
    path: Path,
    epochs: Sequence[int],
    terms: Mapping[str, Sequence[float]],
    weights: Mapping[str, float],
) -> None:
    """Write a PNG with the terms times their weights, on one logarithmic axis.

    Args:
        path: of the picture.
        epochs: numbers of the epochs.
        terms: loss term -> its value in each epoch.
        weights: loss term -> its weight.
    """
    figure = new_figure(3.6)
    axes = figure.add_subplot(ylabel="weight x loss", yscale="log")
    plain(axes)
    whole_epochs(axes)
    for name, values in terms.items():
        colour, mark, _ = _colour(name)
        axes.plot(
            epochs,
            [weights[name] * value for value in values],
            color=colour,
            marker=mark,
            markersize=5,
            markevery=_every(epochs),
            label=f"{name} (weight {weights[name]:.3g})",
        )
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    save(figure, path)


def _colour(name: str) -> tuple[str, str, str]:
    return TERMS.get(name, (VERMILION, "o", name))


def _every(epochs: Sequence[int]) -> int:
    """Return the spacing of markers that leaves the line visible."""
    return max(1, len(epochs) // 20)
