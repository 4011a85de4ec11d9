"""Numbers of a search besides its winner: epochs saved per rung, importance of settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from raygkd.config import SearchConfig
from raygkd.config.search_space import Dimension, in_space
from raygkd.report.tables import show

if TYPE_CHECKING:
    import optuna

    from raygkd.rayrun.search_history import Trial

METRIC = "val_score"
# with fewer trials importance is meaningless, and with fewer per setting unreliable
FEWEST_TRIALS, TRIALS_FOR_EACH = 4, 5
# forests that are grown, each with its own seed, to see how far they agree
FORESTS = 5


@dataclass(frozen=True, kw_only=True)
class Rung:
    """Decisions of the scheduler after an epoch.

    Attributes:
        epoch: the rung.
        reached: trials that reached this epoch.
        stopped: those that were stopped there.
        saved: the epochs that these would still have trained.
    """

    epoch: int
    reached: int
    stopped: int
    saved: int


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Fraction of the trials' variance that each setting explains; all add up to 1.

    Attributes:
        epoch: after which the trials are compared: the last that all reached.
        trials: number of trials.
        shares: setting -> share of the variance by each forest, most important first.
    """

    epoch: int
    trials: int
    shares: dict[str, tuple[float, ...]]

    @property
    def is_hint(self) -> bool:
        """Whether there are too few trials for a reliable order."""
        return self.trials < TRIALS_FOR_EACH * len(self.shares)


def rung_epochs(search: SearchConfig, epochs: int) -> tuple[int, ...]:
    """Return the epochs after which the scheduler may stop a trial.

    With hyperband they are those of all brackets; a trial is only compared within its own bracket.

    Args:
        search: with scheduler, grace period and reduction factor.
        epochs: of a trial that is not stopped.
    """
    found: list[int] = []
    rung = search.grace_period
    while search.scheduler != "none" and rung < epochs:
        found.append(rung)
        rung *= search.reduction_factor
    return tuple(found)


def rung_table(trials: Sequence[Trial], rungs: Sequence[int], epochs: int) -> list[Rung]:
    """Return what happened at each rung.

    Args:
        trials: of the search.
        rungs: see ``rung_epochs``.
        epochs: of a trial that is not stopped.
    """
    rows = []
    for rung in rungs:
        stopped = sum(trial.status == "stopped" and trial.epoch == rung for trial in trials)
        rows.append(
            Rung(
                epoch=rung,
                reached=sum(trial.epoch >= rung for trial in trials),
                stopped=stopped,
                saved=stopped * (epochs - rung),
            )
        )
    return rows


def read_dimensions(facts: Mapping[str, Any]) -> list[Dimension]:
    """Return the search space in a run's facts.

    Args:
        facts: of the run.
    """
    prefix = "search space, "
    found = []
    for name, drawn in facts.items():
        if name.startswith(prefix):
            # what a conditional setting depends on follows its name
            own = name.removeprefix(prefix).partition(" of ")[0]
            ((kind, values),) = ((key, drawn[key]) for key in drawn if key != "when")
            when = tuple(tuple(case.items()) for case in drawn.get("when", ()))
            found.append(Dimension(own, kind, tuple(values), when))
    return found


def importance(trials: Sequence[Trial], space: Sequence[Dimension]) -> Importance | None:
    """Return the importance of each searched setting, by functional ANOVA; None if not possible.

    Trials that were stopped early have trained less, so all are compared after the same epoch.
    Trials with settings outside the space, such as those of kd, are left out, and so are settings
    that only some trials have, or that all have alike.

    Args:
        trials: of the search.
        space: what was searched.

    Source: Hutter, Hoos and Leyton-Brown, "An efficient approach for assessing hyperparameter
        importance" (ICML 2014), as implemented in Optuna.
    """
    trials = [trial for trial in trials if in_space(trial.params, space)]
    space = [dimension for dimension in space if not dimension.when]
    whole = [trial.epoch for trial in trials if trial.status in ("finished", "stopped")]
    epoch = min(whole, default=0)
    scored = [(trial, score) for trial in trials if (score := _score_at(trial, epoch)) is not None]
    values = [score for _, score in scored]
    space = [one for one in space if len({str(trial.params[one.name]) for trial, _ in scored}) > 1]
    if len(scored) < FEWEST_TRIALS or len(set(values)) == 1 or not space:
        return None
    forests = _forests(scored, space)
    shares = {
        name: tuple(float(forest.get(name, 0.0)) for forest in forests) for name in forests[0]
    }
    ranked = sorted(shares, key=lambda name: -float(np.mean(shares[name])))
    return Importance(
        epoch=epoch, trials=len(scored), shares={name: shares[name] for name in ranked}
    )


def _score_at(trial: Trial, epoch: int) -> float | None:
    """Return a trial's score after an epoch, or after its last epoch before."""
    scores = [metrics[METRIC] for metrics in trial.epochs if metrics["epoch"] <= epoch]
    return scores[-1] if scores else None


def _forests(
    scored: Sequence[tuple[Trial, float]], space: Sequence[Dimension]
) -> list[dict[str, float]]:
    """Return the shares of the settings, by every forest."""
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    distributions = {dimension.name: _distribution(dimension) for dimension in space}
    for trial, score in scored:
        params = {
            dimension.name: _plain(dimension, trial.params[dimension.name]) for dimension in space
        }
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=distributions, value=score)
        )
    return [
        get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=seed))
        for seed in range(FORESTS)
    ]


def _distribution(dimension: Dimension) -> optuna.distributions.BaseDistribution:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if dimension.kind == "choice":
        return CategoricalDistribution([_plain(dimension, value) for value in dimension.values])
    low, high = dimension.values
    if dimension.kind == "randint":
        return IntDistribution(low, high - 1)
    return FloatDistribution(low, high, log=dimension.kind == "loguniform")


def _plain(dimension: Dimension, value: Any) -> Any:
    """Return a choice as text, since Optuna has no lists of levels; a number unchanged."""
    return show(value) if dimension.kind == "choice" else value
