"""The first trials of a search: what is known before anything is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raygkd.assembly.methods import matches_graphs, scores_teacher
from raygkd.config import Config, given, with_settings
from raygkd.config.search_space import (
    OF_RUN,
    Dimension,
    default_settings,
    in_space,
    level_problems,
)
from raygkd.errors import ConfigError
from raygkd.workflows.finished_run import open_finished

Params = dict[str, Any]
# fewer trials leave none to draw beside the default settings and kd
FEWEST_FOR_KD = 3
# trials of an earlier search that are taken over
WARM = 3


def first_trials(
    config: Config, space: Sequence[Dimension], channels: Mapping[int, int], task: str
) -> list[Params]:
    """Return the settings of the first trials; the others are drawn.

    The first trial has the default settings, or those given; the second of a search of a graph
    method distils logits (kd). A given space is kept to: the first trial is drawn as well if the
    default settings are not in it, and there is none of kd. With ``--warm-start`` the best trials
    of that search take the place of both.

    Args:
        config: of the search.
        space: the searched settings.
        channels: level -> the teacher's channels, of the levels that both models have.
        task: of the images.

    Raises:
        ConfigError: an earlier search that is missing, or does not suit this one.
    """
    if config.search.warm_start is not None:
        found = _best_of_earlier(config, space, channels)
    else:
        defaults = default_settings(space, config, channels)
        own_space = config.search.space is None
        found = [defaults] if own_space or in_space(defaults, space) else []
        if wants_kd(config, task) and config.search.trials >= FEWEST_FOR_KD:
            found.append(kd_settings(config, defaults))
    return found[: config.search.trials]


def wants_kd(config: Config, task: str) -> bool:
    """Return whether a search of a graph method has trials of kd beside the default settings."""
    is_ours = matches_graphs(config.method.method) and task == "classification"
    return is_ours and scores_teacher(config) and config.search.space is None


def kd_settings(config: Config, defaults: Mapping[str, Any]) -> Params:
    """Return the settings of logit distillation with the default optimiser.

    Args:
        config: of the search.
        defaults: of a trial with the default settings.
    """
    method = {"method": "kd"}
    method |= {name: getattr(config.method, name) for name in ("kd_temperature", "kd_weight")}
    return {"lr": defaults.get("lr", config.optim.lr), **method}


def _best_of_earlier(
    config: Config, space: Sequence[Dimension], channels: Mapping[int, int]
) -> list[Params]:
    """Return the best settings of the search that ``--warm-start`` names, without given ones.

    Models, input sizes and augmentations that this search does not choose among are left out.
    """
    where = f"--warm-start {config.search.warm_start}"
    run = open_finished(str(config.search.warm_start), option="--warm-start", command="tune")
    method, earlier = config.method.method, run.config.method.method
    if earlier != method:
        raise ConfigError(
            f"{where}: is a search of --method {earlier}, and this one uses {method}; choose "
            "another search, or the same method"
        )
    fixed = given(config) - {"lr", "method"}
    scored = [trial for trial in run.trials if trial.status in ("finished", "stopped")]
    if not scored:
        raise ConfigError(f"{where}: has no trial with a score; choose another run, or omit it")
    found: list[Params] = []
    for trial in scored[:WARM]:
        params = {
            name: value
            for name, value in trial.params.items()
            if name not in fixed and (name not in OF_RUN or _chooses(space, name, value))
        }
        try:
            own = with_settings(config, params)
        except ConfigError as error:
            raise ConfigError(f"{where}: trial {trial.number}: {error}") from error
        problems = level_problems({}, own, channels) if matches_graphs(own.method.method) else []
        if problems:
            raise ConfigError(f"{where}: trial {trial.number}: {problems[0]}")
        if params not in found:
            found.append(params)
    return found


def _chooses(space: Sequence[Dimension], name: str, value: Any) -> bool:
    """Return whether a search chooses among values of a setting that include this one."""
    return any(one.name == name and value in one.values for one in space)
