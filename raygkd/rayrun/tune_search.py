"""The search over the method's settings: ASHA on Ray Tune, trials in warm actors.

Tune runs the trials; the history decides on their settings and when they stop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from raygkd.config import ClusterConfig, Config
from raygkd.config.search_space import Dimension
from raygkd.errors import StorageError
from raygkd.metrics.ranking import higher_is_better, rank
from raygkd.rayrun.ray_internals import keep_credentials_here
from raygkd.rayrun.search_history import JOURNAL, History, SearchObserver, Trial
from raygkd.rayrun.searchers import CostsOf, ListedSettings, scheduler, searcher
from raygkd.rayrun.trainables import (
    ERROR,
    IS_MISTAKE,
    IS_STORAGE,
    METRICS_OF_EPOCH,
    DistributedTrial,
    WarmTrial,
)
from raygkd.rayrun.worker import CHECKPOINT, METRIC, Job, trial_folder
from raygkd.storage.atomic_files import Place, storage_errors
from raygkd.storage.temporary import temporary_folder

keep_credentials_here()
# the actor of a trial that trains in workers of its own takes no CPU, or two trials could wait for
# each other's workers for ever
_TRIAL_BUNDLE = {"memory": 1.0e6}


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """The outcome of one trial.

    Attributes:
        number: from 0, in the order of the draws.
        params: the searched settings.
        epochs: number of epochs trained.
        scores: epoch -> validation score.
        val_score: after the last epoch; None if it failed before the first. If it diverged, 0, or
            None where a lower score is better.
        status: "finished", "stopped" (early, by the scheduler), "diverged" or "failed".
        checkpoint: of the last epoch, or None.
        error: one line, if it failed.
        is_mistake: it failed because of a user error.
    """

    number: int
    params: dict[str, Any]
    epochs: int
    scores: dict[int, float]
    val_score: float | None
    status: str
    checkpoint: Place | None
    error: str | None = None
    is_mistake: bool = False


class _Driver:
    """Passes Tune's requests and events to the history of the search in this process.

    Tune pickles its arguments, and a history holds threads and connections of an observer. So the
    history is an attribute of the class and not of the pickled object.

    An error here ends the search: it is kept in ``problem``, all further events are ignored, and
    Tune stops. Tune itself would print a traceback, and would not stop at every error.
    """

    history: History
    trials: dict[str, Trial]
    problem: Exception | None

    @classmethod
    def serve(cls, history: History) -> None:
        """Set the history of this process's search."""
        cls.history, cls.trials, cls.problem = history, {}, None

    @classmethod
    def begin(cls, trial_id: str) -> Trial | None:
        """Return the next trial; None if there is no other."""
        with cls._noting_problems():
            if cls.problem is None and cls.history.left and not cls.history.is_late:
                trial = cls.trials[trial_id] = cls.history.begin()
                return trial
        return None

    @classmethod
    def report(cls, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Record a result; return whether the trial is over."""
        trial = cls.trials[trial_id]
        if cls.problem is not None:
            return True
        with cls._noting_problems():
            if result.get(IS_STORAGE):
                raise StorageError(result[ERROR])
            if ERROR in result:
                cls.history.fail(trial, result[ERROR], is_mistake=result[IS_MISTAKE])
            elif METRIC in result:
                cls.history.report(trial, numbers(result))
        return trial.is_over or cls.problem is not None

    @classmethod
    def fail(cls, trial_id: str, error: str) -> None:
        """Record that a trial has failed for good."""
        if cls.problem is not None:
            return
        with cls._noting_problems():
            cls.history.fail(cls.trials[trial_id], error, is_mistake=False)

    @classmethod
    @contextlib.contextmanager
    def _noting_problems(cls) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            cls.problem = error


class _Settings(Searcher):
    """Tune's searcher: the history's next trial."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        trial = _Driver.begin(trial_id)
        if trial is None:
            return Searcher.FINISHED
        return {"trial": trial.number, "params": trial.params}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass


class _Decisions(FIFOScheduler):
    """Tune's scheduler: the history's decision."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        over = _Driver.report(trial.trial_id, result)
        return TrialScheduler.STOP if over else TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        _Driver.report(trial.trial_id, result)


class _Problems(tune.Stopper):
    """Tune's stopper: an error in the driver stops all trials."""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return _Driver.problem is not None


class _Faults(tune.Callback):
    """Reports failures in Tune to the history."""

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        _Driver.history.lose(_Driver.trials[trial.trial_id], trial.num_failures)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        # the last line of a traceback is the error, the first one of what Ray says of a lost actor
        lines = Path(trial.error_file).read_text().rpartition("Failure # ")[2].splitlines()[1:]
        told = [line.strip() for line in lines if line.strip()]
        _Driver.fail(trial.trial_id, (told[-1] if "Traceback" in lines[0] else told[0])[:300])


def numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of an epoch in a Tune result, without those that Tune adds."""
    return {
        name.removeprefix(METRICS_OF_EPOCH): float(value)
        for name, value in result.items()
        if name.startswith(METRICS_OF_EPOCH) and isinstance(value, int | float)
    }


def run_search(
    job: Job,
    config: Config,
    space: Sequence[Dimension],
    *,
    cpus: float,
    concurrent: int,
    observer: SearchObserver,
    first: Sequence[Mapping[str, Any]] = (),
    is_late: Callable[[], bool] = lambda: False,
    costs_of: CostsOf | None = None,
) -> list[TrialResult]:
    """Run all trials; return them, best first.

    An interrupted search in the job's folder is resumed.

    Args:
        job: of every trial, before its settings are applied.
        config: the base configuration.
        space: the searched settings.
        cpus: of each training process.
        concurrent: trials at the same time.
        observer: receives the events.
        first: settings of the first trials, which are never stopped early; the others are drawn.
        is_late: tells whether the time of the trials is over.
        costs_of: gives the costs of a trial that are aims besides its score; None if there are
            none.

    Raises:
        StorageError: a checkpoint or the journal cannot be written.
    """
    searching = searcher(config, space, first, costs_of)
    trials = config.search.trials
    history = _history(
        job,
        config,
        searching,
        scheduler(config, space),
        trials,
        observer,
        spared=len(first),
        is_late=is_late,
    )
    results = _run(job, config, history, cpus=cpus, concurrent=concurrent)
    score = config.data.score

    def standing(trial: TrialResult) -> tuple[bool, bool, float, int]:
        known = trial.val_score is not None
        ranked = rank(trial.val_score, score) if trial.val_score is not None else 0.0
        return known, trial.status != "diverged", ranked, trial.epochs

    return sorted(results, key=standing, reverse=True)


def run_settings(
    job: Job,
    config: Config,
    settings: Sequence[Mapping[str, Any]],
    *,
    cpus: float,
    concurrent: int,
    observer: SearchObserver,
) -> list[TrialResult]:
    """Train all settings to the end; return the results in the same order.

    Interrupted runs in the job's folder are resumed.

    Args:
        job: of every run, before its settings are applied.
        config: the base configuration.
        settings: setting -> value, of each run.
        cpus: of each training process.
        concurrent: runs at the same time.
        observer: receives the events.

    Raises:
        StorageError: a checkpoint or the journal cannot be written.
    """
    history = _history(
        job, config, ListedSettings(settings), FIFOScheduler(), len(settings), observer
    )
    return _run(job, config, history, cpus=cpus, concurrent=concurrent)


def _history(
    job: Job,
    config: Config,
    searcher: Searcher,
    scheduler: TrialScheduler,
    trials: int,
    observer: SearchObserver,
    spared: int = 0,
    is_late: Callable[[], bool] = lambda: False,
) -> History:
    """Return the history in the job's folder, to resume it."""
    return History(
        job.folder / JOURNAL,
        searcher,
        scheduler,
        trials=trials,
        epochs=config.optim.epochs,
        seed=config.optim.seed,
        observer=observer,
        score=config.data.score,
        spared=spared,
        is_late=is_late,
    )


def _run(
    job: Job, config: Config, history: History, *, cpus: float, concurrent: int
) -> list[TrialResult]:
    """Run the remaining trials of a history; return all trials by number."""
    if history.left:
        _Driver.serve(history)
        with temporary_folder("tune") as folder:
            tuner = _tuner(job, config, history.left, cpus, concurrent, folder)
            with storage_errors(folder):
                tuner.fit()
        if _Driver.problem is not None:
            raise _Driver.problem
    score = config.data.score
    return [_trial_result(trial, job.folder, score) for trial in history.trials]


def _tuner(
    job: Job, config: Config, trials: int, cpus: float, concurrent: int, folder: Path
) -> tune.Tuner:
    return tune.Tuner(
        _trainable(job, config.cluster, cpus),
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="max",
            num_samples=trials,
            max_concurrent_trials=concurrent,
            search_alg=_Settings(),
            scheduler=_Decisions(),
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="search",
            # checkpoints and history are ours; what Tune writes serves its own way to resume
            storage_path=str(folder),
            verbose=0,
            callbacks=[_Faults()],
            stop=_Problems(),
            checkpoint_config=tune.CheckpointConfig(
                checkpoint_frequency=0, checkpoint_at_end=False
            ),
            failure_config=tune.FailureConfig(max_failures=config.cluster.max_failures),
        ),
    )


def _trainable(job: Job, cluster: ClusterConfig, cpus: float) -> Any:
    if cluster.workers.most == 1:
        resources = {"CPU": cpus, "GPU": cluster.gpus_per_worker}
        return tune.with_resources(
            tune.with_parameters(WarmTrial, job=job), tune.PlacementGroupFactory([resources])
        )
    return tune.with_resources(
        tune.with_parameters(DistributedTrial, job=job, cluster=cluster, cpus=cpus),
        tune.PlacementGroupFactory([_TRIAL_BUNDLE]),
    )


def _trial_result(trial: Trial, folder: Place, score: str) -> TrialResult:
    checkpoint = trial_folder(folder, trial.number) / CHECKPOINT
    scores = trial.scores
    if trial.status == "diverged" and not higher_is_better(score):
        del scores[trial.epoch]
    return TrialResult(
        number=trial.number,
        params=trial.params,
        epochs=trial.epoch,
        scores=scores,
        val_score=scores.get(trial.epoch),
        status=trial.status,
        checkpoint=checkpoint if checkpoint.exists() else None,
        error=trial.error,
        is_mistake=trial.is_mistake,
    )
