"""Train one model in the workers of a TorchTrainer of Ray Train, and report its metrics live."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import ray.train
from ray.train.torch import TorchTrainer

from raygkd.config import ClusterConfig
from raygkd.rayrun.gloo_interface import NodeNetwork
from raygkd.rayrun.ray_internals import PolicyTrainer
from raygkd.rayrun.step_progress import StepFile, TellSteps
from raygkd.rayrun.train_policies import FaultsAlone, RoomPolicy, known_cause
from raygkd.rayrun.worker import JOURNAL, Job, train_worker
from raygkd.storage.atomic_files import Place, is_remote
from raygkd.storage.journal import open_journal

# between looks at a journal of metrics: in a folder, and in an object store
POLL_SECONDS, REMOTE_POLL_SECONDS = 0.2, 1.0
# after a start, or a look, until it is looked again whether there is room for other workers
RESIZE_SECONDS = 10.0


class _Trainer(PolicyTrainer):
    """A trainer with the policies of raygkd."""

    def __init__(self, *args: Any, batch_size: int, **options: Any):
        super().__init__(*args, **options)
        self._batch_size = batch_size

    def policies(self) -> dict[str, Any]:
        """Return the policies of raygkd, with scaling if the number of workers may change."""
        policies: dict[str, Any] = {"failure_policy": FaultsAlone(self.run_config.failure_config)}
        if self.scaling_config.elasticity_enabled:
            policies["scaling_policy"] = RoomPolicy(self.scaling_config, self._batch_size)
        return policies


def torch_trainer(
    loop: Callable[[Any], None],
    config: Any,
    folder: Place,
    cluster: ClusterConfig,
    *,
    cpus: float,
    batch_size: int,
) -> TorchTrainer:
    """Return a trainer.

    Args:
        loop: what each worker runs.
        config: argument of ``loop``.
        folder: on storage that all nodes share, for this trainer only.
        cluster: number of workers, their GPUs, and the restarts allowed after failures.
        cpus: per worker.
        batch_size: images per step, summed over all workers.
    """
    workers = cluster.workers
    return _Trainer(
        loop,
        batch_size=batch_size,
        train_loop_config=config,
        torch_config=NodeNetwork(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(workers.least, workers.most) if workers.is_elastic else workers.most,
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker={"CPU": cpus, "GPU": cluster.gpus_per_worker},
        ),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=str(folder),
            failure_config=ray.train.FailureConfig(
                max_failures=cluster.max_failures, controller_failure_limit=cluster.max_failures
            ),
        ),
    )


def train_by_workers(
    job: Job,
    cluster: ClusterConfig,
    *,
    cpus: float,
    on_epoch: Callable[[dict[str, float]], None],
    on_step: TellSteps,
) -> None:
    """Train a run to its end, as ``raygkd.rayrun.trainer.train``; its folder exists.

    Args:
        job: what to train.
        cluster: number of workers and their GPUs.
        cpus: of each worker.
        on_epoch: is called with each epoch's metrics, in another thread.
        on_step: is called with the reported steps, in that thread.
    """
    journal = job.folder / JOURNAL
    trainer = torch_trainer(
        train_worker,
        job,
        job.folder,
        cluster,
        cpus=cpus,
        batch_size=job.settings().optim.batch_size,
    )
    with _followed(journal, on_epoch, StepFile(job.folder), on_step):
        try:
            trainer.fit()
        except Exception as error:
            raise_cause(error)


@contextlib.contextmanager
def _followed(
    path: Place,
    on_epoch: Callable[[dict[str, float]], None],
    steps: StepFile,
    on_step: TellSteps,
) -> Iterator[None]:
    """Report the metrics in a growing journal, and steps, in a thread, whose errors are raised.

    Ray runs in the main thread: a thread that waits for Ray while Ray shuts down would end the
    process.
    """
    over = threading.Event()
    journal = open_journal(path)
    seconds = REMOTE_POLL_SECONDS if is_remote(path) else POLL_SECONDS

    def follow() -> None:
        told = 0
        last = None
        is_last = False
        while not is_last:
            is_last = over.wait(seconds)
            for line in journal.lines()[told:]:
                on_epoch(json.loads(line))
                told += 1
            now = steps.read()
            if now is not None and now != last and now.epoch > told:
                last = now
                on_step(now)

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(follow)
        try:
            yield
        finally:
            over.set()
        following.result()
    steps.remove()


def raise_cause(error: BaseException) -> NoReturn:
    """Raise the cause of a Ray error if it is a known error, else the Ray error."""
    raise known_cause(error) or error
