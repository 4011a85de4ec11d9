"""Trainables of Ray Tune: a warm actor per trial, or a TorchTrainer of several workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import ray
import torch
from ray import tune

from raygkd.config import ClusterConfig
from raygkd.engine.patience import STOPPED_EARLY
from raygkd.errors import StorageError, UserError
from raygkd.rayrun.mailbox import Order, start_mailbox
from raygkd.rayrun.torch_trainer import torch_trainer
from raygkd.rayrun.train_policies import known_cause
from raygkd.rayrun.worker import (
    METRIC,
    Epochs,
    Job,
    ServedTrials,
    next_result,
    run_epochs,
    serve_trials,
    trial_folder,
)

# a trial's problem as entries of a Tune result; as exceptions they would be tried again
ERROR, IS_MISTAKE, IS_STORAGE = "error", "is_mistake", "is_storage"
# how all metrics of an epoch begin in a Tune result, apart from what Tune adds
METRICS_OF_EPOCH = "metrics/"
# what a trainer has to end, before it is ended
CLOSE_SECONDS = 10.0


class WarmTrial(tune.Trainable):
    """A trial with one training process, in an actor that later trials reuse.

    The actor keeps its imports and the decoded images; the state of the training is created anew.
    """

    def setup(self, config: dict[str, Any], job: Job | None = None) -> None:
        """Start the first trial of this actor."""
        assert job is not None
        self._job = job
        self._epochs: Epochs | None = None
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
        """Train one epoch; the first call of a resumed trial returns that of its checkpoint."""
        epochs = self._epochs
        assert epochs is not None
        return tune_result(result_of(lambda: next_result(epochs)), self._last)

    def cleanup(self) -> None:
        """Stop the image stream of the finished trial."""
        if self._epochs is not None:
            self._epochs.close()
            self._epochs = None


class DistributedTrial(tune.Trainable):
    """A trial with several training processes, in the workers of a TorchTrainer.

    The trainer starts with the first trial of this actor and trains the later ones too, so that the
    cost of a start (tens of seconds of imports in nine processes) is paid once per concurrent
    trial.
    """

    def setup(
        self,
        config: dict[str, Any],
        job: Job | None = None,
        cluster: ClusterConfig | None = None,
        cpus: float = 1.0,
    ) -> None:
        """Accept the first trial of this actor."""
        assert job is not None
        assert cluster is not None
        self._job, self._cluster, self._cpus = job, cluster, cpus
        self._pool = ThreadPoolExecutor(1)
        self._training: Future[Any] | None = None
        self._last = int(job.config["optim"]["epochs"])
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Accept another trial."""
        self._order = Order(new_config["trial"], new_config["params"])
        return True

    def step(self) -> dict[str, Any]:
        """Train one epoch; the first call of a resumed trial returns that of its checkpoint."""
        training = self._training or self._start()
        answer = self._mailbox.ask.remote(self._order).future()
        wait([answer, training], return_when=FIRST_COMPLETED)
        if answer.done():
            result = answer.result()
        else:
            # a trainer that has failed is not asked again
            self._training = None
            result = result_of(training.result)
        return tune_result(result, self._last)

    def _start(self) -> Future[Any]:
        """Start the trainer, in a thread; it returns nothing until it ends."""
        self._mailbox = start_mailbox()
        trainer = torch_trainer(
            serve_trials,
            ServedTrials(job=self._job, mailbox=self._mailbox),
            trial_folder(self._job.folder, self._order.trial),
            self._cluster,
            cpus=self._cpus,
            batch_size=self._job.settings().optim.batch_size,
        )
        self._training = self._pool.submit(trainer.fit)
        return self._training

    def cleanup(self) -> None:
        """Stop the trainer."""
        if self._training is not None:
            ray.get(self._mailbox.close.remote())
            wait([self._training], CLOSE_SECONDS)


def tune_result(result: Mapping[str, Any], last: int) -> dict[str, Any]:
    """Return the result for Tune of an epoch, with the trial's number of epochs."""
    metrics = {f"{METRICS_OF_EPOCH}{name}": value for name, value in result.items()}
    return {**result, **metrics, "done": is_over(result, last)}


def is_over(result: Mapping[str, Any], last: int) -> bool:
    """Return whether a trial has trained all its epochs, or has ended before."""
    has_ended = ERROR in result or bool(result["diverged"]) or bool(result.get(STOPPED_EARLY))
    return has_ended or result["epoch"] >= last


def result_of(train: Callable[[], Mapping[str, float]]) -> dict[str, Any]:
    """Return the result of ``train``, or entries that describe a known problem."""
    try:
        return dict(train())
    except Exception as error:
        cause = known_cause(error)
        if cause is None:
            raise
        return {
            METRIC: 0.0,
            "epoch": 0,
            ERROR: str(cause),
            IS_MISTAKE: isinstance(cause, UserError),
            IS_STORAGE: isinstance(cause, StorageError),
        }
