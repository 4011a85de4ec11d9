"""What runs a trial: a warm actor that trains it, or a TorchTrainer of several workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from raygkd.config import ClusterConfig
from raygkd.errors import Diverged, StorageError, UserError
from raygkd.rayrun.controlling import known_cause
from raygkd.rayrun.history import METRIC
from raygkd.rayrun.trainer import torch_trainer
from raygkd.rayrun.worker import Job, run_epochs

# what a trial scores whose loss is not finite: below any accuracy, and a number that can be ranked
DIVERGED = {METRIC: 0.0, "diverged": 1.0}
# a trial's problem as entries of a Tune result; as exceptions they would be tried again
ERROR, IS_MISTAKE, IS_STORAGE = "error", "is_mistake", "is_storage"


class WarmTrial(tune.Trainable):
    """A trial of one training process, in an actor that later trials use again.

    The actor keeps its imports and the decoded images; everything a trial learns is made anew.
    """

    def setup(self, config: dict[str, Any], job: Job | None = None) -> None:
        """Start the first trial of this actor."""
        assert job is not None
        self._job = job
        self._epochs: Iterator[dict[str, float]] | None = None
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Start another trial."""
        self.cleanup()
        job = self._job.of_trial(new_config["trial"], new_config["params"])
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._epochs = run_epochs(job, device=device)
        self._last = int(job.config["optim"]["epochs"])
        return True

    def step(self) -> dict[str, Any]:
        """Train one epoch; the first of a trial that goes on gives that of its checkpoint."""
        epochs = self._epochs
        assert epochs is not None
        result = result_of(lambda: {**next(epochs), "diverged": 0.0})
        over = ERROR in result or bool(result["diverged"]) or result["epoch"] >= self._last
        return result | {"done": over}

    def cleanup(self) -> None:
        """Stop the stream of the trial that is over."""
        if self._epochs is not None:
            self._epochs.close()  # type: ignore[attr-defined]
            self._epochs = None


def distributed_trial(
    config: dict[str, Any], job: Job, cluster: ClusterConfig, cpus: float
) -> None:
    """Run a trial of several training processes: a TorchTrainer inside a Tune trial."""
    job = job.of_trial(config["trial"], config["params"])
    trainer = torch_trainer(job, cluster, cpus=cpus, callbacks=[TuneReportCallback()])

    def fit() -> dict[str, float]:
        trainer.fit()
        return {}

    problem = result_of(fit)
    if problem:
        tune.report(problem)


def result_of(train: Callable[[], Mapping[str, float]]) -> dict[str, Any]:
    """Return what ``train`` does, or the entries of a result that tell a problem that is known."""
    try:
        return dict(train())
    except Exception as error:
        cause = known_cause(error)
        if cause is None:
            raise
        if isinstance(cause, Diverged):
            return {**DIVERGED, "epoch": cause.epoch}
        return {
            METRIC: 0.0,
            "epoch": 0,
            ERROR: str(cause),
            IS_MISTAKE: isinstance(cause, UserError),
            IS_STORAGE: isinstance(cause, StorageError),
        }
