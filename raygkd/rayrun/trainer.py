"""One distillation run over the cluster: a Ray Train TorchTrainer, its metrics as they come."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import ray.train
from ray.exceptions import RayTaskError
from ray.train.torch import TorchTrainer
from ray.train.v2.api.callback import UserCallback

from raygkd.config import ClusterConfig
from raygkd.errors import Diverged, UserError
from raygkd.rayrun.worker import CHECKPOINT, Job, train_worker

JOURNAL = "metrics.jsonl"
POLL_SECONDS = 0.2


class MetricsJournal(UserCallback):
    """Appends rank 0's metrics of each epoch to a file.

    Ray runs it in the controller process, which is on the driver's machine; the driver reads the
    file as it grows, and it is the record on disk that training leaves.
    """

    def __init__(self, path: Path):
        self.path = path

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        """Write one line."""
        with self.path.open("a") as file:
            file.write(json.dumps(metrics[0]) + "\n")


class _Trainer(TorchTrainer):
    """A trainer that leaves Ctrl-C alone: Ray's handler takes long and ends the process itself."""

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


def torch_trainer(
    job: Job, cluster: ClusterConfig, *, cpus: float, name: str, storage: Path, callbacks: list[Any]
) -> TorchTrainer:
    """Return the trainer of one run; a run of the same name and storage is resumed.

    Args:
        job: what to train.
        cluster: number of workers and their GPUs.
        cpus: of each worker.
        name: of the run, a folder inside ``storage``.
        storage: absolute path that all nodes share.
        callbacks: get every report.
    """
    return _Trainer(
        train_worker,
        train_loop_config=job,
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker={"CPU": cpus, "GPU": cluster.gpus_per_worker},
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(storage),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            # a worker group that can never start is an error, not a wait without end
            failure_config=ray.train.FailureConfig(max_failures=0, controller_failure_limit=0),
            callbacks=callbacks,
        ),
    )


def train(
    job: Job,
    cluster: ClusterConfig,
    *,
    cpus: float,
    folder: Path,
    on_epoch: Callable[[dict[str, float]], None],
) -> Path:
    """Train a run to its end; return the path of its last checkpoint.

    Args:
        job: what to train.
        cluster: number of workers and their GPUs.
        cpus: of each worker.
        folder: absolute path of the run's folder; a run that was broken off there goes on.
        on_epoch: is told each epoch's metrics, in another thread; of a run that goes on, those of
            the epochs before too, which may not all have been told when it was broken off.

    Raises:
        UserError: a user's mistake that shows in a worker.
        Diverged: the loss went non-finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    journal = folder / JOURNAL
    journal.touch()
    trainer = torch_trainer(
        job,
        cluster,
        cpus=cpus,
        name="train",
        storage=folder,
        callbacks=[MetricsJournal(journal)],
    )
    with _followed(journal, on_epoch):
        try:
            result = trainer.fit()
        except Exception as error:
            raise_cause(error)
    return Path(result.checkpoint.path) / CHECKPOINT


def last_metrics(folder: Path) -> dict[str, float]:
    """Return the metrics of a run's last epoch, from its journal."""
    return json.loads((folder / JOURNAL).read_text().splitlines()[-1])


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


def known_cause(error: BaseException) -> UserError | Diverged | None:
    """Return the user's mistake or divergence behind an error that came through Ray."""
    queue: list[BaseException | None] = [error]
    seen: set[int] = set()
    while queue:
        current = queue.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        # Ray's form of an error is one of its class too, with a traceback for its text
        if isinstance(current, UserError | Diverged) and not isinstance(current, RayTaskError):
            return current
        queue += [current.__cause__, current.__context__]
        queue += [getattr(current, "cause", None)]
        queue += list(getattr(current, "worker_failures", {}).values())
    return None


def raise_cause(error: BaseException) -> NoReturn:
    """Raise what lies behind an error of Ray's: the user's mistake, the divergence, or itself."""
    raise known_cause(error) or error
