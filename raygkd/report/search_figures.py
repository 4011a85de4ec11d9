"""Report section on a search: curves, settings, their importance, and early stopping."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raygkd.config import Config
from raygkd.config.search_space import Dimension, in_space
from raygkd.metrics.ranking import higher_is_better
from raygkd.report.figures import (
    BLUE,
    INK,
    PALE,
    SCORES,
    Curve,
    draw_search,
    new_figure,
    plain,
    save,
)
from raygkd.report.page import Block, Picture, Section, Table, Words
from raygkd.report.search_numbers import (
    FEWEST_TRIALS,
    METRIC,
    Importance,
    Rung,
    importance,
    rung_epochs,
    rung_table,
)
from raygkd.report.tables import show

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from raygkd.rayrun.search_history import Trial

# with more trials their lines are thinner
THICK_TRIALS = 60
# choices beside an axis: more of them would touch each other
MOST_TICKS = 9


def search_section(
    folder: Path,
    config: Config,
    trials: Sequence[Trial],
    space: Sequence[Dimension],
    others: Mapping[str, float],
    students: Sequence[Block] = (),
) -> Section:
    """Return the section on a search, with its pictures drawn.

    Args:
        folder: for the pictures.
        config: of the search.
        trials: best first.
        space: the search space.
        others: baseline -> its validation score.
        students: what is shown of several students, see ``students_blocks``.
    """
    epochs = config.optim.epochs
    rungs = rung_epochs(config.search, epochs)
    rows = rung_table(trials, rungs, epochs)
    # 0, the score of a trial that diverged, is the worst one only where higher is better
    lower = not higher_is_better(config.data.score)
    scored = [trial for trial in trials if not (lower and trial.status == "diverged")]
    found = importance(scored, space)
    blocks: list[Block] = [_curves(folder, scored, others, rungs)]
    blocks += students
    drawn = [trial for trial in scored if in_space(trial.params, space)]
    if len(drawn) > 1 and space:
        path = folder / "settings.png"
        draw_settings(path, drawn, space)
        blocks.append(
            Picture(
                path,
                "Settings and scores",
                "Each line is a trial: it meets each axis at the value of that setting, and its "
                "colour is the score after the last epoch. Dark lines that meet on an axis show "
                "good values of that setting. Thin lines are trials that were stopped early, so "
                "their scores are from shorter training. A line is interrupted at the settings "
                "that its trial does not have."
                + (
                    " Trials with other settings, such as kd, are left out."
                    if len(drawn) < len(scored)
                    else ""
                ),
                is_wide=True,
            )
        )
    has_cases = any(one.when for one in space)
    blocks += _importance(folder, found, len(trials), has_cases=has_cases)
    blocks += _stops(config, trials, rows)
    return Section(
        anchor="search",
        title="The search",
        blocks=blocks,
        numbers={
            "rungs": [asdict(row) for row in rows],
            "epochs_trained": sum(trial.epoch for trial in trials),
            "epochs_of_full_training": len(trials) * epochs,
            "importance": asdict(found) if found else None,
        },
    )


def _curves(
    folder: Path, trials: Sequence[Trial], others: Mapping[str, float], rungs: Sequence[int]
) -> Picture:
    path = folder / "search.png"
    curves = [Curve(status=trial.status, scores=trial.scores) for trial in trials]
    draw_search(path, curves, others, rungs)
    text = "Score on the validation images after each epoch; each line is a trial."
    if rungs:
        text += " At a rung the scheduler stops the trials that are behind (squares)."
    if others:
        text += " The horizontal lines are the final validation scores of the baselines."
    return Picture(path, "Score of every trial", text)


def _importance(
    folder: Path, found: Importance | None, trials: int, *, has_cases: bool
) -> list[Block]:
    if found is None:
        return [
            Words(
                f"The importance of the settings cannot be estimated: of the {trials} trial(s), at "
                f"least {FEWEST_TRIALS} must have the settings of the search space, and their "
                "scores must differ."
            )
        ]
    path = folder / "importance.png"
    draw_importance(path, found)
    text = (
        f"Share of the differences between {found.trials} trials that each setting explains on its "
        f"own (functional ANOVA), by the score after epoch {found.epoch}, which all of them "
        f"reached. The thin lines span {len(next(iter(found.shares.values())))} random forests."
    )
    if found.is_hint:
        text += (
            f" {found.trials} trials are few for {len(found.shares)} settings: treat this as a "
            "hint."
        )
    if has_cases:
        text += " Settings that only some trials have are left out."
    return [Picture(path, "Importance of the settings", text)]


def _stops(config: Config, trials: Sequence[Trial], rows: Sequence[Rung]) -> list[Block]:
    epochs = config.optim.epochs
    trained, full = sum(trial.epoch for trial in trials), len(trials) * epochs
    broken = sum(trial.status in ("diverged", "failed") for trial in trials)
    if not rows:
        return [Words(f"No trial was stopped early: all were scheduled for {epochs} epochs.")]
    name = {"asha": "ASHA", "hyperband": "Hyperband"}[config.search.scheduler]
    text = (
        f"{name} lets about one trial in {config.search.reduction_factor} continue past each rung. "
        f"The search trained {trained} epochs instead of {full}, {_share(full - trained, full)} "
        "less than training every trial to the end."
    )
    if config.search.scheduler == "hyperband":
        text += " A trial is only compared at the rungs of its own bracket."
    if broken:
        text += f" {broken} trial(s) diverged or failed."
    cells = [(str(r.epoch), str(r.reached), str(r.stopped), str(r.saved)) for r in rows]
    header = ("rung (epoch)", "trials that reached it", "stopped there", "epochs saved")
    return [Words(text), Table(header, cells, texts=0)]


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f}%"


def draw_settings(path: Path, trials: Sequence[Trial], space: Sequence[Dimension]) -> None:
    """Write a PNG of parallel coordinates: an axis for each setting, and the score on the right.

    Args:
        path: of the picture.
        trials: best first.
        space: what was searched.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scored = [trial for trial in trials if trial.epochs]
    scores = [trial.epochs[-1][METRIC] for trial in scored]
    thin = min(1.0, (THICK_TRIALS / max(1, len(scored))) ** 0.5)
    columns = axes_of(space)
    figure = new_figure(4.4, width=max(7.5, 1.15 * (len(columns) + 1)))
    axes = figure.add_subplot(xlim=(-0.35, len(columns) + 0.15), ylim=(-0.04, 1.04))
    low, high = min(scores, default=0.0), max(scores, default=1.0)
    norm = Normalize(low, high if high > low else low + 1e-9)
    colours = ScalarMappable(norm, SCORES)
    for rank, (trial, score) in reversed(list(enumerate(zip(scored, scores)))):
        width = 3.2 if rank == 0 else thin if trial.status == "stopped" else 2 * thin
        axes.plot(
            range(len(columns) + 1),
            [*heights(trial.params, columns), float(norm(score))],
            color=colours.to_rgba(score),  # type: ignore[arg-type]
            linewidth=width,
            # a value between two axes without one would not be seen otherwise
            marker="o",
            markersize=1.5 * width,
            solid_joinstyle="round",
            zorder=2 + (rank == 0),
        )
    for column, dimension in enumerate(columns):
        _draw_axis(axes, column, _ticks(dimension))
    last = [(0.0, f"{low:.3f}"), (1.0, f"{high:.3f}")]
    _draw_axis(axes, len(columns), last if high > low else last[:1])
    names = [dimension.name.replace("_", "\n") for dimension in columns]
    axes.set_xticks(range(len(columns) + 1), [*names, "validation\nscore"], color=INK)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    figure.colorbar(colours, ax=axes, label="score after the last epoch trained", pad=0.02)
    save(figure, path)


def axes_of(space: Sequence[Dimension]) -> list[Dimension]:
    """Return one axis for each setting, over the values that it has in any case.

    Args:
        space: what was searched; a conditional setting has a dimension for each case.
    """
    found: dict[tuple[str, str], Dimension] = {}
    for one in space:
        known = found.get((one.name, one.kind))
        values = one.values
        if known is not None and one.kind == "choice":
            values = tuple({show(value): value for value in (*known.values, *values)}.values())
        elif known is not None:
            values = min(known.values[0], values[0]), max(known.values[1], values[1])
        found[one.name, one.kind] = Dimension(one.name, one.kind, values)
    return list(found.values())


def heights(params: Mapping[str, Any], columns: Sequence[Dimension]) -> list[float]:
    """Return where a trial meets each axis, from 0 to 1; NaN where it does not have the setting.

    Args:
        params: of the trial.
        columns: see ``axes_of``.
    """
    return [place(one, params[one.name]) if one.name in params else math.nan for one in columns]


def place(dimension: Dimension, value: Any) -> float:
    """Return the position of a value between bottom (0) and top (1) of its setting's axis."""
    if dimension.kind == "choice":
        texts = [show(choice) for choice in dimension.values]
        return texts.index(show(value)) / (len(texts) - 1) if len(texts) > 1 else 0.5
    low, high = dimension.values
    if dimension.kind == "randint":
        high -= 1
    if dimension.kind == "loguniform":
        low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low) if high > low else 0.5


def _ticks(dimension: Dimension) -> list[tuple[float, str]]:
    """Return the positions and texts of the ticks of a setting's axis."""
    if dimension.kind == "choice":
        every = math.ceil(len(dimension.values) / MOST_TICKS)
        return [(place(dimension, v), show(v)) for v in dimension.values[::every]]
    low, high = dimension.values
    if dimension.kind == "randint":
        return [(place(dimension, value), show(value)) for value in dict.fromkeys((low, high - 1))]
    middle = math.sqrt(low * high) if dimension.kind == "loguniform" else (low + high) / 2
    return [(place(dimension, value), show(float(value))) for value in (low, middle, high)]


def _draw_axis(axes: Axes, column: int, ticks: Sequence[tuple[float, str]]) -> None:
    axes.plot([column, column], [0, 1], color=PALE, linewidth=1.2, zorder=1)
    for height, text in ticks:
        axes.annotate(
            text,
            (column, height),
            (-5, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=8.5,
            color=INK,
            zorder=5,
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.8, "linewidth": 0},
        )


def draw_importance(path: Path, found: Importance) -> None:
    """Write a PNG with a bar for each setting, most important first."""
    names = list(found.shares)
    means = np.array([np.mean(found.shares[name]) for name in names])
    spans = np.array([(min(found.shares[name]), max(found.shares[name])) for name in names]).T
    figure = new_figure(1.0 + 0.34 * len(names))
    axes = figure.add_subplot(xlabel="fraction of the variance explained", xlim=(0, None))
    plain(axes, grid="x")
    error = np.abs(spans - means)
    axes.barh(names, means, 0.6, color=BLUE, xerr=error, ecolor=INK, capsize=3)
    for name, mean, high in zip(names, means, spans[1]):
        axes.annotate(
            f"{100 * mean:.0f}%",
            (high, name),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlim(0, 1.12 * max(spans[1]))
    axes.xaxis.set_major_formatter("{x:.0%}")
    save(figure, path)
