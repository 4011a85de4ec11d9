"""Train one model to its end: in this process, or in the workers of a TorchTrainer."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator

import torch

from raygkd.config import ClusterConfig
from raygkd.errors import RunFailed, UserError
from raygkd.rayrun.cluster import is_joined
from raygkd.rayrun.step_progress import StepReport, TellSteps
from raygkd.rayrun.worker import CHECKPOINT, JOURNAL, METRICS, Epochs, Job, journalled, run_epochs
from raygkd.storage.atomic_files import Place, make_folder
from raygkd.storage.journal import read_entries

OnEpoch = Callable[[dict[str, float]], None]
_log = logging.getLogger(__name__)


def train(
    job: Job, cluster: ClusterConfig, *, cpus: float, on_epoch: OnEpoch, on_step: TellSteps
) -> Place:
    """Train a run to its end; return the path of its last checkpoint.

    One worker on no cluster but this machine is this process: the controller and the worker of a
    TorchTrainer would take far longer to start than a small model to train. An interrupted run in
    the job's folder is resumed.

    Args:
        job: what to train.
        cluster: number of workers and their GPUs.
        cpus: of each worker.
        on_epoch: is called with each epoch's metrics, maybe in another thread. A resumed run also
            reports its earlier epochs, which may not all have been reported before the
            interruption.
        on_step: is called, in the same thread, with some of the steps from the first one on.

    Raises:
        UserError: a user error in training.
        Diverged: the loss is not finite.
        StorageError: the checkpoint cannot be written.
    """
    make_folder(job.folder)
    if is_here(cluster):
        _train_here(job, cluster, cpus, on_epoch, on_step)
    else:
        from raygkd.rayrun.torch_trainer import train_by_workers

        train_by_workers(job, cluster, cpus=cpus, on_epoch=on_epoch, on_step=on_step)
    return job.folder / CHECKPOINT


def is_here(cluster: ClusterConfig) -> bool:
    """Return whether a run that has the cluster to itself trains in this process."""
    return cluster.workers.most == 1 and not is_joined(cluster.address)


def _train_here(
    job: Job, cluster: ClusterConfig, cpus: float, on_epoch: OnEpoch, on_step: TellSteps
) -> None:
    """Train a run in this process, from its last checkpoint after a failure, as workers do."""
    told = 0
    for failures in range(cluster.max_failures + 1):
        try:
            with _threads(cpus), contextlib.closing(_epochs_here(job, cluster, on_step)) as epochs:
                for epoch, metrics in enumerate(epochs):
                    if epoch >= told:
                        on_epoch(metrics)
                        told += 1
        except (UserError, RunFailed):
            raise
        except Exception as error:
            if failures == cluster.max_failures:
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            _log.warning(
                f"run {job.folder.name} failed (restart {failures + 1} of at most "
                f"{cluster.max_failures}); it resumes after epoch {told}: {reason}"
            )
        else:
            return


def _epochs_here(job: Job, cluster: ClusterConfig, on_step: TellSteps) -> Epochs:
    """Yield the metrics of every epoch of a run, those in its journal first."""
    known = read_entries(job.folder / JOURNAL, METRICS)
    yield from known
    device = torch.device("cuda" if cluster.gpus_per_worker else "cpu")
    report = StepReport(on_step, job.settings().optim.batch_size)
    for metrics in journalled(run_epochs(job, device=device, on_step=report), job.folder):
        if metrics["epoch"] > len(known):
            yield metrics


@contextlib.contextmanager
def _threads(cpus: float) -> Iterator[None]:
    """Let torch use as many threads as in a worker with these CPUs, as Ray sets them."""
    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, int(cpus)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def last_metrics(folder: Place) -> dict[str, float]:
    """Return the metrics of a run's last epoch, from its journal."""
    return read_entries(folder / JOURNAL, METRICS)[-1]
