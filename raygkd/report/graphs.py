"""Report section on the channel graphs of teacher and student.

Shape letters: C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from raygkd.report.figures import PALE, new_figure, save
from raygkd.report.graph_numbers import GraphView
from raygkd.report.page import Picture, Section, Table, Words

# level -> name -> view
Levels = Mapping[int, Mapping[str, GraphView]]
TITLES = {"teacher": "teacher", "before": "student before", "after": "student after"}
# cosines: 0 is white, and both signs are told apart by every kind of colour vision
COSINES = "RdBu_r"
ORDER = "viridis"


def graphs_section(
    folder: Path, levels: Levels, *, images: int, centred: bool, dim: int, whose: str
) -> Section:
    """Return the section on the channel graphs, with its pictures drawn.

    Args:
        folder: for the pictures.
        levels: level -> "teacher", "before" and "after" -> view.
        images: number of images of the graphs.
        centred: the channels were compared without their means.
        dim: spectral dimension of the run.
        whose: name of the student in the text.
    """
    adjacency, embedding = folder / "adjacency.png", folder / "embedding.png"
    draw_adjacency(adjacency, levels)
    draw_embeddings(embedding, levels)
    cosine = "correlation" if centred else "cosine similarity"
    rows = [
        (
            str(level),
            str(len(views["teacher"].adjacency_CC)),
            *(f"{views[name].edge_difference:.3f}" for name in ("before", "after")),
            *(f"{views[name].spectral_distance:.3f}" for name in ("before", "after")),
        )
        for level, views in levels.items()
    ]
    header = (
        "level",
        "channels",
        "edges before",
        "edges after",
        "spectrum before",
        "spectrum after",
    )
    return Section(
        anchor="graphs",
        title="Channel graphs",
        blocks=[
            Words(
                "In a channel graph a vertex is a channel of a feature map, and an edge is the "
                f"{cosine} of two channels. The student learns to reproduce the teacher's graph at "
                f"each matched level. Shown are averages over the same {images} validation images, "
                f"without random changes. The {whose} is seen through its adapter, the 1x1 "
                "convolution that maps its channels to the teacher's; before training, both have "
                "their initial weights, and batch normalisation uses the statistics of these "
                "images."
            ),
            Picture(
                adjacency,
                "Adjacency of the channels",
                "Each row and column is a channel, in the order of the teacher's Fiedler vector, "
                "which puts similar channels next to each other. The more similar the student's "
                "matrix is to the teacher's, the more of the graph it has learnt.",
                is_wide=True,
            ),
            Table(
                header,
                rows,
                texts=0,
                note="Edges: root mean square of the difference to the teacher's adjacency. "
                f"Spectrum: squared distance of the embeddings in up to {dim} dimensions after the "
                "best rotation, in units of the teacher's. 0 is the teacher's own graph.",
            ),
            Picture(
                embedding,
                "Spectral embedding, first two dimensions",
                "Each dot is a channel, coloured by its position in the teacher's order; the "
                "student's dots are rotated to match the teacher's (Procrustes), and thin lines "
                "lead to the teacher's dot of the same channel.",
                is_wide=True,
            ),
        ],
        numbers={
            "images": images,
            "student": whose,
            "levels": {
                str(level): {
                    name: {
                        "edge_difference": view.edge_difference,
                        "spectral_distance": view.spectral_distance,
                    }
                    for name, view in views.items()
                    if name != "teacher"
                }
                for level, views in levels.items()
            },
        },
    )


def draw_adjacency(path: Path, levels: Levels) -> None:
    """Write a PNG of adjacency matrices: a row for each level, a column for each model."""
    names = list(next(iter(levels.values())))
    figure = new_figure(0.35 + 2.02 * len(levels))
    grid = figure.subplots(len(levels), len(names), squeeze=False)
    for axes, name in zip(grid[0], names):
        axes.set_title(TITLES[name], fontsize=11)
    for row, (level, views) in zip(grid, levels.items()):
        for axes, name in zip(row, names):
            matrix_CC = views[name].adjacency_CC.numpy()
            image = axes.imshow(matrix_CC, cmap=COSINES, vmin=-1, vmax=1, interpolation="auto")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_color(PALE)
        row[0].set_ylabel(f"level {level}\n{len(matrix_CC)} channels", fontsize=10)
    bar = figure.colorbar(image, ax=grid, label="cosine of two channels", shrink=0.8, aspect=30)
    bar.set_ticks([-1, -0.5, 0, 0.5, 1])
    save(figure, path)


def draw_embeddings(path: Path, levels: Levels) -> None:
    """Write a PNG of embeddings in the plane: a row for each level, a column for each model."""
    from matplotlib.ticker import MaxNLocator

    names = list(next(iter(levels.values())))
    figure = new_figure(0.55 + 2.25 * len(levels))
    grid = figure.subplots(len(levels), len(names), squeeze=False)
    for axes, name in zip(grid[0], names):
        axes.set_title(TITLES[name], fontsize=11)
    for axes in grid[-1]:
        axes.set_xlabel("dimension 1", fontsize=9)
    for row, (level, views) in zip(grid, levels.items()):
        teacher_C2 = views["teacher"].embedding_C2.numpy()
        reach = _reach([view.embedding_C2.numpy() for view in views.values()])
        for axes, name in zip(row, names):
            places_C2 = views[name].embedding_C2.numpy()
            if name != "teacher":
                for ends in zip(places_C2, teacher_C2):
                    axes.plot(*np.array(ends).T, color=PALE, linewidth=0.6, zorder=1)
            axes.scatter(
                *places_C2.T,
                c=np.arange(len(places_C2)),
                cmap=ORDER,
                s=14,
                zorder=2,
                edgecolor="0.4",
                linewidth=0.3,
            )
            axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
            axes.tick_params(labelsize=7)
            axes.axhline(0, color="0.92", zorder=0)
            axes.axvline(0, color="0.92", zorder=0)
            axes.spines[:].set_color(PALE)
            axes.xaxis.set_major_locator(MaxNLocator(5, symmetric=True))
            axes.yaxis.set_major_locator(MaxNLocator(5, symmetric=True))
        row[0].set_ylabel(f"level {level}\ndimension 2", fontsize=9)
    save(figure, path)


def _reach(embeddings: Sequence[np.ndarray]) -> float:
    """Return the axis limit that includes all dots."""
    return 1.1 * max(float(np.abs(places_C2).max()) for places_C2 in embeddings) or 1.0
