"""Report section on accuracy against size and latency."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from raygkd.metrics.latency import Latency
from raygkd.report.figures import BLUE, GREEN, INK, ORANGE, new_figure, plain, save
from raygkd.report.page import Picture, Section, Table, Words
from raygkd.report.tables import score_text

# role -> colour and mark, the same in all pictures
ROLES = {
    "teacher": (INK, "s"),
    "student alone": (ORANGE, "D"),
    "best student": (BLUE, "o"),
    "student": (BLUE, "o"),
}


@dataclass(frozen=True, kw_only=True)
class ScoredModel:
    """A model of the run.

    Attributes:
        parameters: their number.
        test_score: on the test split, 0 to 1; None if it was not scored.
        latency: of it.
    """

    parameters: int
    test_score: float | None
    latency: Latency


def sizes_section(
    folder: Path, models: Mapping[str, ScoredModel], image: str, hardware: str
) -> Section:
    """Return the section on size and latency, with a picture of several models.

    Args:
        folder: for the picture.
        models: role -> model.
        image: the models' input, for the text.
        hardware: of the latency measurement.
    """
    pictures = []
    scored = {role: model for role, model in models.items() if model.test_score is not None}
    if len(scored) > 1:
        path = folder / "sizes.png"
        draw_sizes(path, scored)
        text = (
            "Models further left are smaller or faster, models further up have a higher score. The "
            "whiskers on the right reach from the median to the 95th percentile of the runs."
        )
        pictures.append(Picture(path, "Test score against parameters and latency", text))
    runs = next(iter(models.values())).latency.runs
    rows = [
        (
            role,
            f"{model.parameters:,}",
            f"{model.latency.median:.2f}",
            f"{model.latency.p95:.2f}",
            score_text(model.test_score),
        )
        for role, model in models.items()
    ]
    header = ("", "parameters", "median ms", "p95 ms", "test score")
    return Section(
        anchor="sizes",
        title="Accuracy, size and speed",
        blocks=[
            Words(
                f"Latency is the time of one {image}, measured while this report was written: "
                f"{runs} runs of each model, alternating, so that other load on the machine "
                f"affects all models alike. Hardware: {hardware}."
            ),
            Table(header, rows),
            *pictures,
        ],
        numbers={
            "hardware": hardware,
            "latency_ms": {
                role: {"median": m.latency.median, "p95": m.latency.p95, "runs": runs}
                for role, m in models.items()
            },
        },
    )


def draw_sizes(path: Path, models: Mapping[str, ScoredModel]) -> None:
    """Write a PNG with two panels: score against parameters, and against latency.

    Args:
        path: of the picture.
        models: role -> model.
    """
    figure = new_figure(3.8)
    left, right = figure.subplots(1, 2, sharey=True)
    left.set(xlabel="parameters (millions)", ylabel="test score")
    right.set(xlabel="latency of one image (ms)")
    for role, model in models.items():
        colour, mark = ROLES.get(role, (GREEN, "^"))
        style = {
            "color": colour,
            "marker": mark,
            "markersize": 10,
            "linestyle": "none",
            "clip_on": False,
        }
        left.plot(model.parameters / 1e6, model.test_score, label=role, **style)
        latency = model.latency
        reach = [[0.0], [max(0.0, latency.p95 - latency.median)]]
        right.errorbar(latency.median, model.test_score, xerr=reach, capsize=4, **style)
    for axes in (left, right):
        plain(axes, grid="both")
        axes.set_xlim(0, 1.08 * axes.get_xlim()[1])
        axes.margins(y=0.2)
    figure.legend(loc="outside upper center", ncols=len(models), frameon=False)
    save(figure, path)
