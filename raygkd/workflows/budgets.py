"""What the students of a search cost, and which of them are within the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from raygkd.assembly.models import untrained_file
from raygkd.config import INT8_COSTS, Config, flag
from raygkd.data.spec import ImageSpec
from raygkd.deploy.costs import student_costs
from raygkd.errors import ConfigError
from raygkd.models import short_name

# cost -> its unit in messages
_UNITS = {
    "params": " parameters",
    "mb": " MB",
    "mflops": " MFLOPs",
    "memory": " MB of memory",
    "latency": " ms",
    "int8_mb": " MB in 8 bits",
    "int8_latency": " ms in 8 bits",
}
# what a cost belongs to: the name of a student, and the side of its input in pixels if that is
# searched
Built = tuple[str, int | None]
Costs = Mapping[Built, Mapping[str, float]]
# the setting of a limit, and its value
Limit = tuple[str, float]


def built_of(params: Mapping[str, Any], student: str) -> Built:
    """Return what the model of a trial is.

    Args:
        params: the trial's settings.
        student: of trials that name none.
    """
    return params.get("student", student), params.get("image_size")


def built_name(student: str, side: int | None) -> str:
    """Return the name of a student in messages, with the side of its input if that is searched."""
    return short_name(student) + (f" at {side} pixels" if side is not None else "")


def measured_costs(config: Config, students: Sequence[Built], spec: ImageSpec) -> Costs:
    """Return the costs of each student; none where the search does not depend on them.

    Args:
        config: of the search.
        students: to measure.
        spec: of the images.

    Raises:
        ConfigError: packages that the latency needs are missing.
    """
    wanted = {*config.search.limits, *config.search.aims}
    if config.search.budget_of == "int8":
        # both are shown
        wanted |= {"int8_mb"} | {cost for cost, of in INT8_COSTS.items() if of in wanted}
    if not wanted and len(students) == 1:
        return {}
    files = {
        (name, side): untrained_file(name, spec.of_trial({"image_size": side}))
        for name, side in students
    }
    return student_costs(files, wanted, threads=config.search.latency_threads)


def within_budget(
    config: Config, students: Sequence[Built], costs: Costs, console: Console
) -> tuple[Built, ...]:
    """Return the students within the limits; print which are not, and by how much.

    Args:
        config: of the search.
        students: to choose from.
        costs: of each, see ``measured_costs``.
        console: for the students that are left out.

    Raises:
        ConfigError: no student is within the limits; names the nearest.
    """
    limits = config.search.limits
    excess = {one: _excess(costs[one], limits) for one in students} if limits else {}
    over = {one: broken for one, broken in excess.items() if broken}
    if over and len(over) == len(students):
        nearest = min(over, key=lambda one: max(over[one].values()))
        raise ConfigError(
            f"no student is within the budget; the nearest is {built_name(*nearest)}: "
            f"{_told(costs[nearest], limits, over[nearest])}; raise the limit, or add a smaller "
            "student (--students)"
        )
    for one, broken in over.items():
        console.print(
            f"not trained: {built_name(*one)}: {_told(costs[one], limits, broken)}",
            soft_wrap=True,
        )
    return tuple(one for one in students if one not in over)


def _excess(costs: Mapping[str, float], limits: Mapping[str, Limit]) -> dict[str, float]:
    """Return each cost that exceeds its limit, as a multiple of it."""
    shares = {cost: costs[cost] / limit for cost, (_, limit) in limits.items()}
    return {cost: share for cost, share in shares.items() if share > 1}


def _told(
    costs: Mapping[str, float], limits: Mapping[str, Limit], broken: Mapping[str, float]
) -> str:
    """Return the costs that exceed a limit, in words."""
    return ", ".join(
        f"{costs[cost]:,.6g}{_UNITS[cost]} ({flag(limits[cost][0])} {limits[cost][1]:,.6g})"
        for cost in broken
    )
