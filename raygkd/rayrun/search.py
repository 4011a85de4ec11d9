"""The search over the method's settings: ASHA on Ray Tune, trials in warm actors."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.tune.integration.ray_train import CHECKPOINT_PATH_KEY, TuneReportCallback
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import SearchAlgorithm, Searcher
from ray.tune.search.basic_variant import BasicVariantGenerator

from raygkd.config import ClusterConfig, Config, to_mapping
from raygkd.engine import Training, read_checkpoint, restore, save_checkpoint
from raygkd.errors import Diverged, UserError
from raygkd.rayrun.trainer import known_cause, torch_trainer
from raygkd.rayrun.worker import CHECKPOINT, Job, make_training
from raygkd.space import Dimension

METRIC = "val_score"
# what a trial scores whose loss is not finite: below any accuracy, and a number that can be ranked
DIVERGED = {METRIC: 0.0, "diverged": 1.0}
# Ray's own entries of a result
_OWN = (
    "epoch", "lr", "train_loss", "train_accuracy", "epoch_seconds", "images_per_second",
    "bad_images", "diverged", "first_step_seconds", "teacher_cached",
)  # fmt: skip
# the actor of a trial that trains in workers of its own takes no CPU, or two trials could wait for
# each other's workers for ever
_TRIAL_BUNDLE = {"memory": 1.0e6}


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """How one trial went.

    Attributes:
        trial_id: Tune's name for it.
        params: the searched settings.
        epochs: trained.
        val_score: after the last epoch; None if it failed before the first.
        status: "finished", "stopped" (by ASHA), "diverged" or "failed".
        checkpoint: of the last epoch, or None.
        error: one line, where it failed.
        is_mistake: it failed by a mistake of the user's.
    """

    trial_id: str
    params: dict[str, Any]
    epochs: int
    val_score: float | None
    status: str
    checkpoint: Path | None
    error: str | None = None
    is_mistake: bool = False


class SearchObserver:
    """What a search tells of its trials while it runs, in the driver. Override what is wanted."""

    def started(self, trial_id: str, params: Mapping[str, Any]) -> None:
        """Tell that a trial starts, or starts again."""

    def reported(self, trial_id: str, metrics: Mapping[str, float]) -> None:
        """Tell the metrics of an epoch."""

    def ended(self, trial_id: str, failed: bool) -> None:
        """Tell that a trial is over."""


class _Relay(tune.Callback):
    """Passes Tune's events on to the observer of the search that runs in this process.

    Tune pickles its callbacks into the state it is resumed from, and an observer holds threads
    and connections: so the class knows it, and the pickled object does not.
    """

    observer: SearchObserver = SearchObserver()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.observer.started(trial.trial_id, trial.config)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self.observer.reported(trial.trial_id, numbers(result))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.observer.ended(trial.trial_id, failed=False)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.observer.ended(trial.trial_id, failed=True)


def numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the training loop's metrics of a Tune result, without Tune's own entries."""
    return {
        name: float(value)
        for name, value in result.items()
        if isinstance(value, int | float)
        and (name in _OWN or name.startswith(("loss_", "val_", "gradient_")))
    }


class WarmTrial(tune.Trainable):
    """A trial of one training process, in an actor that later trials use again.

    The actor keeps its imports and the decoded images; everything a trial learns is made anew.
    """

    def setup(self, config: dict[str, Any], job: Job | None = None) -> None:
        """Start the first trial of this actor."""
        assert job is not None
        self._job = job
        self._training: Training | None = None
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Start another trial."""
        self.cleanup()
        self._params = new_config
        self._training = None
        return True

    def _start(self, first_epoch: int) -> Training:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        settings = self._job.settings(self._params)
        return make_training(self._job, settings, device=device, first_epoch=first_epoch)

    def step(self) -> dict[str, Any]:
        """Train one epoch."""
        if self._training is None:
            self._training = self._start(0)
        training = self._training
        try:
            metrics = training.run_epoch()
        except Diverged as error:
            return {**DIVERGED, "epoch": error.epoch, "done": True}
        return metrics | {"diverged": 0.0, "done": training.epoch >= training.epochs}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write the trial's state."""
        assert self._training is not None
        save_checkpoint(Path(checkpoint_dir) / CHECKPOINT, self._training)

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Go on where ``save_checkpoint`` was."""
        state = read_checkpoint(Path(checkpoint_dir) / CHECKPOINT)
        self._training = self._start(state["epoch"])
        restore(self._training, state)

    def cleanup(self) -> None:
        """Stop the stream of the trial that is over."""
        if self._training is not None:
            self._training.stream.close()


def distributed_trial(
    params: dict[str, Any], job: Job, cluster: ClusterConfig, cpus: float, storage: Path
) -> None:
    """Run a trial of several training processes: a TorchTrainer inside a Tune trial."""
    trainer = torch_trainer(
        dataclasses.replace(job, config=to_mapping(job.settings(params))),
        cluster,
        cpus=cpus,
        name=tune.get_context().get_trial_id(),
        storage=storage,
        callbacks=[TuneReportCallback()],
    )
    try:
        trainer.fit()
    except Exception as error:
        cause = known_cause(error)
        if not isinstance(cause, Diverged):
            raise
        tune.report({**DIVERGED, "epoch": cause.epoch})


def tune_domain(dimension: Dimension) -> Any:
    """Return Tune's form of a searched setting."""
    if dimension.kind == "choice":
        return tune.choice(list(dimension.values))
    return getattr(tune, dimension.kind)(*dimension.values)


def run_search(
    job: Job,
    config: Config,
    space: Sequence[Dimension],
    *,
    cpus: float,
    concurrent: int,
    folder: Path,
    observer: SearchObserver,
    resume: bool = False,
) -> list[TrialResult]:
    """Try settings until all trials are over; return them, best first.

    Args:
        job: what every trial trains, before its settings are put in.
        config: the base configuration.
        space: the searched settings.
        cpus: of each training process.
        concurrent: trials at the same time.
        folder: absolute path for Tune's state and the checkpoints.
        observer: is told what happens.
        resume: go on with the search that was broken off in ``folder``.
    """
    trainable = _trainable(job, config.cluster, cpus, folder)
    _Relay.observer = observer
    domains = {dimension.name: tune_domain(dimension) for dimension in space}
    state = str(folder / "search")
    # a run may have been broken off before its search began
    if resume and tune.Tuner.can_restore(state):
        tuner = tune.Tuner.restore(
            state,
            trainable=trainable,
            param_space=domains,
            resume_unfinished=True,
            restart_errored=True,
        )
    else:
        tuner = _tuner(trainable, domains, config, concurrent, folder)
    return sorted(
        (_trial_result(result, config.optim.epochs) for result in tuner.fit()),
        key=lambda trial: (-1.0 if trial.val_score is None else trial.val_score, trial.epochs),
        reverse=True,
    )


def _trainable(job: Job, cluster: ClusterConfig, cpus: float, folder: Path) -> Any:
    if cluster.workers == 1:
        resources = {"CPU": cpus, "GPU": cluster.gpus_per_worker}
        return tune.with_resources(
            tune.with_parameters(WarmTrial, job=job), tune.PlacementGroupFactory([resources])
        )
    return tune.with_resources(
        tune.with_parameters(
            distributed_trial, job=job, cluster=cluster, cpus=cpus, storage=folder / "trials"
        ),
        tune.PlacementGroupFactory([_TRIAL_BUNDLE]),
    )


def _tuner(
    trainable: Any, domains: dict[str, Any], config: Config, concurrent: int, folder: Path
) -> tune.Tuner:
    warm = config.cluster.workers == 1
    checkpoints = tune.CheckpointConfig(num_to_keep=1, checkpoint_frequency=1 if warm else 0)
    return tune.Tuner(
        trainable,
        param_space=domains,
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="max",
            num_samples=config.search.trials,
            max_concurrent_trials=concurrent,
            search_alg=searcher(config),
            scheduler=scheduler(config),
            reuse_actors=warm,
        ),
        run_config=tune.RunConfig(
            name="search",
            storage_path=str(folder),
            verbose=0,
            callbacks=[_Relay()],
            checkpoint_config=checkpoints,
        ),
    )


def searcher(config: Config) -> SearchAlgorithm | Searcher:
    """Return what draws the settings of the trials."""
    if config.search.searcher == "random":
        return BasicVariantGenerator(random_state=config.optim.seed)
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # it warns that lists, such as choices of levels, cannot be kept in a store; there is none
    warnings.filterwarnings("ignore", "Choices for a categorical distribution", UserWarning)
    return OptunaSearch(seed=config.optim.seed)


def scheduler(config: Config) -> TrialScheduler:
    """Return what stops trials early."""
    search, epochs = config.search, config.optim.epochs
    if search.scheduler == "none":
        return FIFOScheduler()
    # a bracket's grace period is that of the one before, times the reduction factor
    brackets = 1
    while (
        search.scheduler == "hyperband"
        and search.grace_period * search.reduction_factor**brackets < epochs
    ):
        brackets += 1
    return AsyncHyperBandScheduler(
        time_attr="epoch",
        max_t=epochs,
        grace_period=search.grace_period,
        reduction_factor=search.reduction_factor,
        brackets=brackets,
    )


def _trial_result(result: Any, epochs: int) -> TrialResult:
    metrics = result.metrics or {}
    done = int(metrics.get("epoch", 0))
    status = "finished" if done >= epochs else "stopped"
    if metrics.get("diverged"):
        status = "diverged"
    if result.error is not None:
        status = "failed"
    cause = known_cause(result.error) or result.error if result.error is not None else None
    place = metrics.get(CHECKPOINT_PATH_KEY) or (result.checkpoint and result.checkpoint.path)
    return TrialResult(
        trial_id=metrics.get("trial_id") or Path(result.path).name.split("_")[1],
        params=dict(result.config or {}),
        epochs=done,
        val_score=metrics.get(METRIC),
        status=status,
        checkpoint=Path(place) / CHECKPOINT if place else None,
        error=" ".join(str(cause).split())[:300] if cause is not None else None,
        is_mistake=isinstance(cause, UserError),
    )
