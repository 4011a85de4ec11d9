"""One distillation run over the cluster: a Ray Train TorchTrainer, its metrics as they come."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import ray.train
from ray.train.torch import TorchTrainer
from ray.train.v2.api.callback import UserCallback

from raygkd.config import ClusterConfig
from raygkd.files import make_folder, telling_of_storage, whole_lines
from raygkd.rayrun.controlling import FaultsAlone, MetricsJournal, known_cause
from raygkd.rayrun.worker import CHECKPOINT, Job, train_worker

JOURNAL = "metrics.jsonl"
POLL_SECONDS = 0.2


class _Trainer(TorchTrainer):
    """A trainer that leaves Ctrl-C alone: Ray's handler takes long and ends the process itself."""

    def _register_sigint_handler(self, controller: Any) -> None:
        pass

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        parts["failure_policy"] = FaultsAlone(self.run_config.failure_config)
        return super()._initialize_and_run_controller(**parts)


def torch_trainer(
    loop: Callable[[Any], None],
    config: Any,
    folder: Path,
    cluster: ClusterConfig,
    *,
    cpus: float,
    callbacks: Sequence[UserCallback] = (),
) -> TorchTrainer:
    """Return a trainer.

    Args:
        loop: what each worker runs.
        config: what it is given.
        folder: on storage that all nodes share, of this trainer alone.
        cluster: number of workers and their GPUs, and how many faults they are started again after.
        cpus: of each worker.
        callbacks: get every report.
    """
    return _Trainer(
        loop,
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker={"CPU": cpus, "GPU": cluster.gpus_per_worker},
        ),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=str(folder),
            # a worker group that can never start is an error, not a wait without end
            failure_config=ray.train.FailureConfig(
                max_failures=cluster.max_failures, controller_failure_limit=cluster.max_failures
            ),
            callbacks=list(callbacks),
        ),
    )


def train(
    job: Job,
    cluster: ClusterConfig,
    *,
    cpus: float,
    on_epoch: Callable[[dict[str, float]], None],
) -> Path:
    """Train a run to its end; return the path of its last checkpoint.

    A run that was broken off in the job's folder goes on.

    Args:
        job: what to train.
        cluster: number of workers and their GPUs.
        cpus: of each worker.
        on_epoch: is told each epoch's metrics, in another thread; of a run that goes on, those of
            the epochs before too, which may not all have been told when it was broken off.

    Raises:
        UserError: a user's mistake that shows in a worker.
        Diverged: the loss went non-finite.
        StorageError: the checkpoint cannot be written.
    """
    make_folder(job.folder)
    journal = job.folder / JOURNAL
    with telling_of_storage(journal):
        journal.touch()
    trainer = torch_trainer(
        train_worker, job, job.folder, cluster, cpus=cpus, callbacks=[MetricsJournal(journal)]
    )
    with _followed(journal, on_epoch):
        try:
            trainer.fit()
        except Exception as error:
            raise_cause(error)
    return job.folder / CHECKPOINT


def last_metrics(folder: Path) -> dict[str, float]:
    """Return the metrics of a run's last epoch, from its journal."""
    return json.loads(whole_lines(folder / JOURNAL)[-1])


@contextlib.contextmanager
def _followed(journal: Path, on_epoch: Callable[[dict[str, float]], None]) -> Iterator[None]:
    """Tell the metrics in a journal while it grows, in a thread; what goes wrong there is raised.

    The main thread is Ray's: a thread that waits for Ray when Ray is shut down ends the process.
    """
    over = threading.Event()

    def follow() -> None:
        with journal.open() as file:
            while not over.wait(POLL_SECONDS):
                _pass_on(file, on_epoch)
            _pass_on(file, on_epoch)

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(follow)
        try:
            yield
        finally:
            over.set()
        following.result()


def _pass_on(file: Any, on_epoch: Callable[[dict[str, float]], None]) -> None:
    while True:
        place = file.tell()
        line = file.readline()
        if not line.endswith("\n"):
            file.seek(place)
            return
        on_epoch(json.loads(line))


def raise_cause(error: BaseException) -> NoReturn:
    """Raise what lies behind an error of Ray's: a mistake or failure that is known, or itself."""
    raise known_cause(error) or error
