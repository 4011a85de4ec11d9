"""Students of a search by score and cost: a table, a picture, and the report's part on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from raygkd.config import SearchConfig
from raygkd.metrics.ranking import score_title
from raygkd.models import short_name
from raygkd.report import page
from raygkd.report.figures import BLUE, FAINT, INK, VERMILION, new_figure, plain, save
from raygkd.report.tables import new_table, score_text
from raygkd.storage.atomic_files import Place

# cost -> label of its axis
TITLES = {
    "params": "parameters",
    "mb": "size of the float32 weights, MB",
    "mflops": "MFLOPs for one image",
    "memory": "memory for one image, MB",
    "latency": "latency of one image in ONNX Runtime, ms",
    "int8_mb": "size of the file in 8 bits, MB",
    "int8_latency": "latency of one image in 8 bits in ONNX Runtime, ms",
}


# cost -> head of its column
HEADS = {
    "params": "parameters",
    "mb": "MB",
    "mflops": "MFLOPs",
    "memory": "memory MB",
    "latency": "ms",
    "int8_mb": "int8 MB",
    "int8_latency": "int8 ms",
}


def students_table(students: Sequence[Mapping[str, Any]]) -> Table:
    """Return the students of a search with their costs, best first.

    Args:
        students: "student", "val_score", "costs" and "front" of each.
    """
    table = new_table("Students by validation score (*: no other student beats it in all aims)")
    table.add_column("")
    table.add_column("student", overflow="fold")
    known = _known(students)
    for title in ("val score", *(HEADS[name] for name in known)):
        table.add_column(title, justify="right", no_wrap=True)
    for row in students:
        costs = [_cost_text(name, row["costs"][name]) for name in known]
        mark = "*" if row["front"] else ""
        table.add_row(mark, _name(row), score_text(row["val_score"]), *costs)
    return table


def _known(students: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the costs that all students have."""
    return [name for name in HEADS if all(name in row["costs"] for row in students)]


def _cost_text(name: str, cost: float) -> str:
    return f"{cost:,.{0 if name == 'params' else 2}f}"


def _name(row: Mapping[str, Any]) -> str:
    """Return the name of a row's student, with the side of its input if that was searched."""
    # earlier versions searched none
    side = row.get("image_size")
    return short_name(row["student"]) + (f" at {side} px" if side is not None else "")


def draw_front(
    path: Place,
    students: Sequence[Mapping[str, Any]],
    search: SearchConfig,
    score: str,
    teacher: float | None,
) -> None:
    """Write a PNG of the best trial of each student, atomically.

    Args:
        path: of the picture.
        students: "student", "val_score", "costs" and "front", whether no other student beats it.
        search: its first cost among the aims is on the horizontal axis, with its limit as a line.
        score: what students are ranked by.
        teacher: its validation score, drawn as a line; None if it is unknown.
    """
    cost = next(iter(search.aims), "params")
    figure = new_figure(4.2)
    axes = figure.add_subplot(
        xlabel=TITLES[cost],
        ylabel=f"validation {score_title(score)}",
        title="Students of the search",
    )
    plain(axes, grid="both")
    front = sorted((row for row in students if row["front"]), key=lambda row: row["costs"][cost])
    axes.plot(
        [row["costs"][cost] for row in front],
        [row["val_score"] for row in front],
        color=BLUE,
        drawstyle="steps-post",
        linewidth=1.2,
    )
    for row in students:
        place = (row["costs"][cost], row["val_score"])
        axes.plot(*place, marker="o", color=BLUE if row["front"] else FAINT, linestyle="none")
        axes.annotate(_name(row), place, xytext=(5, -11), textcoords="offset points", size=8)
    if cost in search.limits:
        axes.axvline(
            search.limits[cost][1], color=VERMILION, linewidth=1.2, linestyle="--", label="limit"
        )
    if teacher is not None:
        axes.axhline(teacher, color=INK, linewidth=1.2, linestyle=":", label="teacher")
    axes.plot([], [], color=BLUE, marker="o", label="no other student beats it")
    axes.plot([], [], color=FAINT, marker="o", linestyle="none", label="beaten")
    axes.margins(0.12)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    save(figure, path)


def students_blocks(
    folder: Path,
    students: Sequence[Mapping[str, Any]],
    search: SearchConfig,
    score: str,
    teacher: float | None,
) -> list[page.Block]:
    """Return what the report shows of a search over several students: a picture and a table.

    Args:
        folder: for the picture.
        students: as for ``draw_front``.
        search: the settings of the search.
        score: what students are ranked by.
        teacher: its validation score; None if it is unknown.
    """
    path = folder / "front.png"
    draw_front(path, students, search, score, teacher)
    aims = ("score", *(aim for aim in search.objective if aim != "score"))
    names = _known(students)
    rows = [
        (
            _name(row),
            score_text(row["val_score"]),
            *(_cost_text(name, row["costs"][name]) for name in names),
            "yes" if row["front"] else "no",
        )
        for row in students
    ]
    return [
        page.Picture(
            path,
            "Students",
            f"The best trial of each student by {' and '.join(aims)}. No other student "
            "is at least as good as a blue one in every aim and better in one.",
        ),
        page.Table(
            ("student", "validation score", *(HEADS[name] for name in names), "in the front"),
            rows,
            texts=1,
        ),
    ]
