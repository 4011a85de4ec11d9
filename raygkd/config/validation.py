"""Checks of settings, individually and in combination."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from raygkd.config.schema import (
    LARGEST_SEED,
    LEAST_SHARE,
    ClusterConfig,
    DataConfig,
    MethodConfig,
    OptimConfig,
    OutputConfig,
    RecipeConfig,
    allowed_choices,
    settings,
)
from raygkd.config.search import CompareConfig, SearchConfig
from raygkd.config.values import LevelPair, WorkerRange, flag, seconds_of
from raygkd.errors import ConfigError, brief, control_characters, near
from raygkd.registry import METHODS

# of whole numbers without a limit of their own
LARGEST_NUMBER = 2**32 - 1


def check_value(name: str, leaf: dataclasses.Field, value: Any) -> list[str]:
    """Return the problems of the value of one setting."""
    if value is None:
        return []
    if isinstance(value, WorkerRange):
        values: tuple[Any, ...] = (value.least, value.most)
    else:
        values = value if isinstance(value, tuple) else (value,)
    if any(isinstance(v, float) and not math.isfinite(v) for v in values):
        return [f"{flag(name)} {_shown(value)}: must be a finite number"]
    if any(isinstance(v, int) and abs(v) > LARGEST_NUMBER for v in values):
        return [f"{flag(name)} {_shown(value)}: must be at most {LARGEST_NUMBER}"]
    for text in values:
        # settings without a default of their own mean "not given" by it
        if text == "" and leaf.default != "":
            return [f"{flag(name)} '': is empty; omit it, or pass a value"]
        if isinstance(text, str) and (unseen := control_characters(text)):
            return [f"{flag(name)} {brief(text)}: contains {unseen}; choose another"]
    choices = allowed_choices(leaf)
    for chosen in values if choices else ():
        if chosen not in choices:
            allowed = ", ".join(choices)
            return [
                f"{flag(name)} {brief(chosen)}: must be one of {allowed}{near(chosen, choices)}"
            ]
    words = {"minimum": "at least", "above": "above", "maximum": "at most", "below": "below"}
    broken = {
        "minimum": lambda v, bound: v < bound,
        "above": lambda v, bound: v <= bound,
        "maximum": lambda v, bound: v > bound,
        "below": lambda v, bound: v >= bound,
    }
    limits = {kind: bound for kind, bound in leaf.metadata["limits"].items() if bound is not None}
    if any(broken[kind](v, bound) for v in values for kind, bound in limits.items()):
        allowed = " and ".join(f"{words[kind]} {bound:.10g}" for kind, bound in limits.items())
        return [f"{flag(name)} {_shown(value)}: must be {allowed}"]
    return []


def _shown(value: Any) -> str:
    return brief(value if isinstance(value, int) else str(value), quoted=False)


def check_values(values: Mapping[str, Any]) -> None:
    """Check the values of single settings.

    Args:
        values: name of a setting -> its value.

    Raises:
        ConfigError: values that are not allowed; lists all, one per line.
    """
    known = settings()
    problems = [
        problem
        for name, value in values.items()
        for problem in check_value(name, known[name][1], value)
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def check_together(
    *,
    data: DataConfig,
    method: MethodConfig,
    optim: OptimConfig,
    recipe: RecipeConfig,
    cluster: ClusterConfig,
    output: OutputConfig,
    search: SearchConfig,
    compare: CompareConfig,
) -> list[str]:
    """Return the problems of combinations of settings."""
    return [
        *_method_problems(method),
        *_task_weight_problems(method),
        *_recipe_problems(recipe),
        *_worker_problems(cluster.workers, optim.batch_size),
        *_gpu_problems(cluster.gpus_per_worker),
        *_year_problems(data.years),
        *_class_problems(data.classes),
        *_epoch_problems(optim, search),
        *_comparison_problems(compare),
        *_student_problems(search),
        *_output_problems(output),
        *_milestone_problems(optim.milestones),
    ]


def _method_problems(method: MethodConfig) -> list[str]:
    problems = []
    if method.levels is not None and not _are_levels(method.levels):
        shown = ",".join(map(str, method.levels))
        problems.append(f"--levels {shown!r}: must be different whole numbers from 1")
    if (
        method.alpha == method.beta == method.gamma == 0
        and method.method in METHODS.names()
        and METHODS.get(method.method).matches_graphs
    ):
        problems.append(
            f"--method {method.method} with --alpha, --beta and --gamma all 0 matches no graphs; "
            "raise one of them, or use --method none"
        )
    return problems


def _task_weight_problems(method: MethodConfig) -> list[str]:
    known = METHODS.names()
    if method.task_weight != 0 or method.method not in known or method.method == "none":
        return []
    # imported here because it needs torch
    from raygkd.losses import trains_classifier

    if trains_classifier(method.method):
        return []
    trained = [name for name in known if trains_classifier(name)]
    return [
        f"--task-weight 0: --method {method.method} compares no class scores, so the student's "
        f"last layer would learn nothing; choose another weight, or one of {', '.join(trained)}"
    ]


def _recipe_problems(recipe: RecipeConfig) -> list[str]:
    if recipe.randaugment and recipe.trivial_augment:
        return ["--randaugment and --trivial-augment exclude each other; use only one of them"]
    return []


def _are_levels(pairs: Sequence[LevelPair]) -> bool:
    """Return whether no level is chosen twice, of either model, and all are counted from 1."""
    of_student = [pair.student for pair in pairs]
    of_teacher = [pair.teacher for pair in pairs if pair.teacher is not None]
    return bool(pairs) and all(
        len(set(levels)) == len(levels) and min(levels, default=1) >= 1
        for levels in (of_student, of_teacher)
    )


def _worker_problems(workers: WorkerRange, batch_size: int) -> list[str]:
    if 0 < workers.most < workers.least:
        return [f"--workers {workers}: the first number must not be larger than the second"]
    if workers.least > 0 and any(batch_size % n for n in (workers.least, workers.most)):
        return [
            f"--batch-size {batch_size} cannot be split evenly over --workers {workers}; use a "
            "multiple"
        ]
    return []


def _gpu_problems(gpus: float) -> list[str]:
    # numbers that are not finite are refused for every setting
    if (
        not math.isfinite(gpus)
        or gpus == 0
        or LEAST_SHARE <= gpus <= 1
        or (gpus > 1 and gpus.is_integer())
    ):
        return []
    return [f"--gpus-per-worker {gpus:g}: must be 0, from {LEAST_SHARE:g} to 1, or a whole number"]


def _year_problems(years: tuple[int, ...]) -> list[str]:
    if years and set(years) <= {2007, 2012} and len(set(years)) == len(years):
        return []
    return [f"--years {brief(','.join(map(str, years)))}: must be 2007, 2012, or both"]


def _class_problems(classes: tuple[str, ...] | None) -> list[str]:
    if classes is None or (classes and len(set(classes)) == len(classes)):
        return []
    return [f"--classes {brief(','.join(classes))}: must be different names"]


def _epoch_problems(optim: OptimConfig, search: SearchConfig) -> list[str]:
    problems = []
    if 0 < optim.epochs < search.grace_period:
        problems.append(
            f"--grace-period {search.grace_period}: must be at most --epochs {optim.epochs}"
        )
    if 0 < optim.epochs <= optim.warmup_epochs:
        problems.append(
            f"--warmup-epochs {optim.warmup_epochs}: must be below --epochs {optim.epochs}"
        )
    if 0 < optim.epochs <= optim.freeze_epochs:
        problems.append(
            f"--freeze-epochs {optim.freeze_epochs}: must be below --epochs {optim.epochs}"
        )
    if optim.seed <= LARGEST_SEED < optim.seed + search.repeat:
        problems.append(
            f"--repeat {search.repeat}: uses the seeds after --seed {optim.seed}, but the largest "
            f"allowed seed is {LARGEST_SEED}; lower one of them"
        )
    return problems


def _student_problems(search: SearchConfig) -> list[str]:
    problems = []
    for name, values in (("students", search.students), ("objective", search.objective)):
        if values is not None and (not values or len(set(values)) < len(values)):
            problems.append(f"{flag(name)} {','.join(values)!r}: must be different names")
    if search.time_budget is not None and seconds_of(search.time_budget) is None:
        problems.append(
            f"--time-budget {search.time_budget!r}: must be a number above 0 with its unit, "
            "such as 90s, 30m or 2h"
        )
    return problems


def _comparison_problems(compare: CompareConfig) -> list[str]:
    methods = compare.methods
    if methods is None:
        return []
    shown = ",".join(methods)
    if not methods or len(set(methods)) < len(methods):
        return [f"--methods {shown!r}: must be different methods"]
    if compare.preset is not None:
        return [
            f"--methods {shown}: --preset {compare.preset} sets its own methods; use only one of "
            "them"
        ]
    return []


def _output_problems(output: OutputConfig) -> list[str]:
    problems = []
    authority = (output.tracking_uri or "").partition("://")[2].partition("/")[0]
    if ":" in authority.rpartition("@")[0]:
        problems.append(
            "--tracking-uri: contains a password, which would be stored with the run; set "
            "MLFLOW_TRACKING_URI, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    name = output.name
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", name):
        problems.append(
            f"--name {brief(name)}: must consist of letters, digits, '-', '_' and '.', at most "
            "200, and start with a letter or digit"
        )
    return problems


def _milestone_problems(milestones: tuple[float, ...]) -> list[str]:
    shown = ",".join(map(str, milestones))
    if not all(0 < m < 1 for m in milestones):
        return [f"--milestones {shown}: must lie between 0 and 1"]
    if any(after <= before for before, after in itertools.pairwise(milestones)):
        return [f"--milestones {shown}: must rise"]
    return []
