"""What draws the settings of a search's trials, and what stops trials early.

Both are Tune's interfaces; the history of a search gives them its events.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from raygkd.config import Config
from raygkd.config.search_space import Dimension, in_space
from raygkd.rayrun.worker import METRIC

# the costs of a trial with some settings that are aims besides its score: less of each is better
CostsOf = Callable[[Mapping[str, Any]], Sequence[float]]


class RandomSettings(Searcher):
    """Draws the settings of each trial independently.

    Args:
        space: the searched settings; those that others depend on come first.
        seed: of the draws.
    """

    def __init__(self, space: Sequence[Dimension], seed: int):
        super().__init__(METRIC, "max")
        self._domains = [(dimension, tune_domain(dimension)) for dimension in space]
        self._random = np.random.default_rng(seed)

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """Return the settings of the next trial."""
        params: dict[str, Any] = {}
        for dimension, domain in self._domains:
            if dimension.applies(params):
                params[dimension.name] = domain.sample(random_state=self._random)
        return params

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Ignore the outcome of a trial."""

    def add_evaluated_point(self, parameters: Any, value: float, **details: Any) -> None:
        """Ignore the outcome of settings that were not drawn."""


class TpeSettings(Searcher):
    """Draws settings by Optuna's tree-structured Parzen estimator, from the scores so far.

    With costs as further aims it draws towards the front: settings that no others beat in all aims.

    Args:
        space: the searched settings; those that others depend on come first.
        seed: of the draws.
        costs: how many there are among the aims.
        costs_of: gives them.
    """

    def __init__(
        self,
        space: Sequence[Dimension],
        seed: int,
        costs: int = 0,
        costs_of: CostsOf = lambda params: (),
    ):
        super().__init__(METRIC, "max")
        # not imported by those who draw at random
        import optuna
        from optuna.study import StudyDirection

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # it warns that lists, such as choices of levels, cannot be kept in a store; there is none
        warnings.filterwarnings("ignore", "Choices for a categorical distribution", UserWarning)
        self._space, self._costs_of = space, costs_of
        self._study = optuna.create_study(
            sampler=optuna.samplers.TPESampler(seed=seed),
            directions=[StudyDirection.MAXIMIZE, *[StudyDirection.MINIMIZE] * costs],
        )
        self._trials: dict[str, tuple[Any, dict[str, Any]]] = {}

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """Return the settings of the next trial."""
        trial = self._study.ask()
        params: dict[str, Any] = {}
        self._trials[trial_id] = trial, params
        for place, dimension in enumerate(self._space):
            if dimension.applies(params):
                # a setting has a distribution of its own for each case
                params[dimension.name] = _suggested(trial, str(place), dimension)
        return params

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Ignore the metrics of an epoch that is not the last."""

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Learn from the outcome of a trial."""
        from optuna.trial import TrialState

        trial, params = self._trials.pop(trial_id)
        if result is None:
            self._study.tell(trial, state=TrialState.FAIL)
        else:
            self._study.tell(trial, [result[METRIC], *self._costs_of(params)])

    def add_evaluated_point(self, parameters: Any, value: float, **details: Any) -> None:
        """Learn from the outcome of settings that were not drawn but are in the space."""
        from optuna.trial import create_trial

        places = {
            str(place): dimension
            for place, dimension in enumerate(self._space)
            if dimension.applies(parameters)
        }
        self._study.add_trial(
            create_trial(
                params={place: parameters[one.name] for place, one in places.items()},
                distributions={place: _distribution(one) for place, one in places.items()},
                values=[value, *self._costs_of(parameters)],
            )
        )


def _suggested(trial: Any, name: str, dimension: Dimension) -> Any:
    """Return the value that Optuna's trial suggests for a searched setting."""
    low, high = dimension.values[0], dimension.values[-1]
    if dimension.kind == "choice":
        return trial.suggest_categorical(name, dimension.values)
    if dimension.kind == "randint":
        return trial.suggest_int(name, low, high - 1)
    return trial.suggest_float(name, low, high, log=dimension.kind == "loguniform")


def _distribution(dimension: Dimension) -> Any:
    """Return Optuna's distribution of a searched setting."""
    from optuna import distributions

    low, high = dimension.values[0], dimension.values[-1]
    if dimension.kind == "choice":
        return distributions.CategoricalDistribution(dimension.values)
    if dimension.kind == "randint":
        return distributions.IntDistribution(low, high - 1)
    return distributions.FloatDistribution(low, high, log=dimension.kind == "loguniform")


class FirstSettings(Searcher):
    """Returns given settings for the first trials, then those that another searcher draws.

    Args:
        first: settings of the first trials.
        then: draws the others; it gets the outcomes of all trials in its space.
        space: that it draws from.
    """

    def __init__(
        self, first: Sequence[Mapping[str, Any]], then: Searcher, space: Sequence[Dimension]
    ):
        super().__init__(METRIC, "max")
        self._first, self._then, self._space = first, then, space

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the settings of the trial with this number."""
        if self._is_first(trial_id):
            return dict(self._first[int(trial_id)])
        return self._then.suggest(trial_id)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Report the metrics of an epoch of a drawn trial."""
        if not self._is_first(trial_id):
            self._then.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Report the outcome of a trial."""
        if not self._is_first(trial_id):
            self._then.on_trial_complete(trial_id, result, error)
        elif result and in_space(self._first[int(trial_id)], self._space):
            self._then.add_evaluated_point(dict(self._first[int(trial_id)]), result[METRIC])

    def _is_first(self, trial_id: str) -> bool:
        return int(trial_id) < len(self._first)


class ListedSettings(Searcher):
    """Returns given settings one after the other.

    Args:
        settings: of each trial.
    """

    def __init__(self, settings: Sequence[Mapping[str, Any]]):
        super().__init__(METRIC, "max")
        self._settings = settings

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """Return the settings of the trial with this number."""
        return dict(self._settings[int(trial_id)])

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Ignore the outcome of a trial."""


def tune_domain(dimension: Dimension) -> Any:
    """Return Tune's sampling domain of a searched setting."""
    if dimension.kind == "choice":
        return tune.choice(list(dimension.values))
    return getattr(tune, dimension.kind)(*dimension.values)


def searcher(
    config: Config,
    space: Sequence[Dimension],
    first: Sequence[Mapping[str, Any]] = (),
    costs_of: CostsOf | None = None,
) -> Searcher:
    """Return the searcher, which draws the settings of the trials after the first ones.

    Args:
        config: of the search.
        space: the searched settings.
        first: settings of the first trials.
        costs_of: gives the costs among the aims; None if there are none.
    """
    drawing = _drawing(config, space, costs_of)
    return FirstSettings(first, drawing, space) if first else drawing


def _drawing(config: Config, space: Sequence[Dimension], costs_of: CostsOf | None) -> Searcher:
    seed = config.optim.seed
    if config.search.searcher == "random":
        return RandomSettings(space, seed)
    if costs_of is None:
        return TpeSettings(space, seed)
    costs = len(set(config.search.objective) - {"score"})
    return TpeSettings(space, seed, costs, costs_of)


def scheduler(config: Config, space: Sequence[Dimension] = ()) -> TrialScheduler:
    """Return the scheduler, which stops trials early.

    Of several students a small one learns faster than a large one and ends below it, so trials are
    compared with those of the same student, and of the same input size where that is searched.

    Args:
        config: of the search.
        space: the searched settings.
    """
    if config.search.scheduler == "none":
        return FIFOScheduler()
    if any(dimension.name in ("student", "image_size") for dimension in space):
        return OfEachStudent(config)
    return _halving(config)


def _halving(config: Config) -> TrialScheduler:
    search, epochs = config.search, config.optim.epochs
    # a bracket's grace period is that of the one before, times the reduction factor
    brackets = 1
    while (
        search.scheduler == "hyperband"
        and search.grace_period * search.reduction_factor**brackets < epochs
    ):
        brackets += 1
    return AsyncHyperBandScheduler(
        time_attr="epoch",
        metric=METRIC,
        mode="max",
        max_t=epochs,
        grace_period=search.grace_period,
        reduction_factor=search.reduction_factor,
        brackets=brackets,
    )


class OfEachStudent(FIFOScheduler):
    """Stops trials early that are behind others of the same student and input size.

    Args:
        config: of the search.
    """

    def __init__(self, config: Config):
        super().__init__()
        self._config = config
        self._schedulers: dict[Any, TrialScheduler] = {}

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Add a trial, whose "params" name its student and size."""
        self._schedulers.setdefault(_built(trial), _halving(self._config))
        self._of(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return whether a trial continues after an epoch."""
        return self._of(trial).on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Record the outcome of a trial."""
        self._of(trial).on_trial_complete(tune_controller, trial, result)

    def _of(self, trial: Any) -> TrialScheduler:
        return self._schedulers[_built(trial)]


def _built(trial: Any) -> tuple[Any, Any]:
    """Return the student and the input size of a trial, None where they are not searched."""
    return trial.params.get("student"), trial.params.get("image_size")
