"""Report sections on scores over several seeds: repeats of a search, and methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raygkd.metrics.ranking import WORST, rank
from raygkd.report.figures import BLUE, INK, new_figure, plain, save
from raygkd.report.page import Picture, Section, Table, Words
from raygkd.report.tables import COMPARED, comparison_rows
from raygkd.storage.atomic_files import Place

Scores = Sequence[float | None]


def repeat_section(folder: Path, repeat: Mapping[str, Any], score: str) -> Section:
    """Return the section on ``raygkd tune --repeat``, with its picture drawn.

    Args:
        folder: for the picture.
        repeat: of the result.
        score: what models are ranked by.
    """
    models, seeds = repeat["models"], repeat["seeds"]

    def standing(role: str) -> float:
        mean = models[role]["mean"]
        return WORST if mean is None else rank(mean, score)

    ranked = sorted(models, key=standing, reverse=True)
    path = folder / "seeds.png"
    draw_seeds(path, {_name(role): models[role]["test_scores"] for role in ranked}, "test score")
    rows = []
    for role in ranked:
        ahead = repeat["best_minus"].get(role, {"mean": None, "std": None})
        numbers = [_number(models[role]["mean"]), _number(models[role]["std"])]
        rows.append((_name(role), *numbers, _number(ahead["mean"], "+"), _number(ahead["std"])))
    header = ("model", "mean", "std", "lead of best", "std of lead")
    return Section(
        anchor="seeds",
        title="Other seeds",
        blocks=[
            Words(
                "The best settings, and the models that they are compared with, were retrained "
                f"with {len(seeds)} other seed(s) ({', '.join(map(str, seeds))}). A lead no larger "
                "than its standard deviation may be chance."
            ),
            Table(
                header,
                rows,
                note="Scores on the test images; std is the sample standard deviation.",
            ),
            Picture(path, "Scores of each seed", _READ),
        ],
        numbers={"models": models, "best_minus": repeat["best_minus"]},
    )


def comparison_section(folder: Path, comparison: Mapping[str, Any]) -> Section:
    """Return the section that ranks methods, with its picture drawn.

    Args:
        folder: for the picture.
        comparison: as for ``comparison_rows``, with "metric" and "reference", which the
            p-values are against.
    """
    methods, metric, seeds = comparison["methods"], comparison["metric"], comparison["seeds"]
    path = folder / "comparison.png"
    draw_seeds(path, {row["method"]: row["scores"] for row in methods}, metric)
    rows = [(str(n), *cells) for n, cells in enumerate(comparison_rows(comparison), start=1)]
    return Section(
        anchor="comparison",
        title="Methods compared",
        blocks=[
            Words(
                f"Every method was trained with {len(seeds)} seed(s) "
                f"({', '.join(map(str, seeds))}) and is ranked by its mean {metric}."
            ),
            Table(
                ("#", *COMPARED),
                rows,
                texts=2,
                note="std is the sample standard deviation. p is the probability of a difference "
                f"from {comparison['reference']} at least as large by chance alone, by a paired "
                "t-test over the seeds. Step time and memory are those of a training process; "
                "factors are relative to the student alone.",
            ),
            Picture(path, "Methods by score", _READ),
        ],
        numbers=dict(comparison),
    )


_READ = (
    "Each dot is a seed, and the bar is the mean. Rows whose dots overlap may differ only by "
    "chance."
)


def draw_seeds(path: Place, scores: Mapping[str, Scores], metric: str) -> None:
    """Write a PNG with a row of dots for each model or method.

    Args:
        path: of the picture.
        scores: name -> score of each seed, None if missing; the first row is at the top.
        metric: name of the score.
    """
    figure = new_figure(1.1 + 0.45 * len(scores))
    axes = figure.add_subplot(xlabel=metric)
    plain(axes, grid="x")
    for row, values in enumerate(scores.values()):
        known = [value for value in values if value is not None]
        axes.plot(known, [row] * len(known), "o", color=BLUE, alpha=0.75)
        if known:
            mean = sum(known) / len(known)
            axes.plot([mean, mean], [row - 0.28, row + 0.28], color=INK, linewidth=2.5)
    axes.set_yticks(range(len(scores)), scores, parse_math=False)
    axes.set_ylim(len(scores) - 0.5, -0.5)
    save(figure, path)


def _name(role: str) -> str:
    return role.replace("_", " ")


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}z.4f}"
