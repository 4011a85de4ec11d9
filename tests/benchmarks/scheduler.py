"""What a search costs besides its training: seconds for each trial that has nothing to train.

    python tests/benchmarks/scheduler.py 64 256 1024

Each number of trials, of 20 students, is searched with ASHA in actors that answer at once, two at a
time; first with the search's journal alone, and then with everything that is recorded in MLflow
(SQLite) besides. The memory is that of the driver, after each.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from ray import tune

from raygkd.config import Config, to_mapping, with_settings
from raygkd.config.search_space import Dimension
from raygkd.rayrun import tune_search
from raygkd.rayrun.cluster import cluster
from raygkd.rayrun.search_history import SearchObserver, Trial
from raygkd.rayrun.trainables import tune_result
from raygkd.rayrun.worker import METRIC, Job
from raygkd.tracking.store import connect, default_uri
from raygkd.tracking.tracker import Tracker

EPOCHS = 3
STUDENTS = tuple(f"student {number}" for number in range(20))
SPACE = (
    Dimension(name="student", kind="choice", values=STUDENTS),
    Dimension(name="lr", kind="loguniform", values=(0.01, 0.1)),
)


class Nothing(tune.Trainable):
    """A trial whose epochs take no time; its score is its learning rate."""

    def setup(self, config: dict[str, Any], job: Job | None = None) -> None:
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._score, self._epoch = new_config["params"]["lr"], 0
        return True

    def step(self) -> dict[str, Any]:
        self._epoch += 1
        told = {METRIC: self._score, "epoch": self._epoch, "diverged": 0.0}
        return tune_result(told, EPOCHS)


class Recorder(SearchObserver):
    """Records trials as ``raygkd tune`` does."""

    def __init__(self, tracker: Tracker):
        self._tracker = tracker

    def started(self, trial: Trial) -> None:
        self._tracker.start(str(trial.number), f"trial {trial.number}", params=trial.params)

    def reported(self, trial: Trial, metrics: Any) -> None:
        self._tracker.metrics(str(trial.number), metrics, step=trial.epoch)

    def ended(self, trial: Trial) -> None:
        self._tracker.end(str(trial.number))


def resident_mib() -> float:
    """Return the memory that this process holds."""
    return psutil.Process().memory_info().rss / (1 << 20)


def search_nothing(trials: int, folder: Path, observer: SearchObserver) -> tuple[float, int]:
    """Return the seconds that a search takes, and how many epochs its trials tell."""
    config = with_settings(Config(), {"trials": trials, "epochs": EPOCHS})
    job = Job(
        config=to_mapping(config),
        images=None,
        teacher=None,
        folder=folder,
        stop=None,  # type: ignore[arg-type]
    )
    started = time.perf_counter()
    results = tune_search.run_search(job, config, SPACE, cpus=1.0, concurrent=2, observer=observer)
    return time.perf_counter() - started, sum(trial.epochs for trial in results)


def main(numbers: list[int]) -> None:
    """Print a line for each number of trials."""
    tune_search.WarmTrial = Nothing  # type: ignore[misc, assignment]
    with cluster(None), tempfile.TemporaryDirectory() as name:
        # the first search of a process starts its actors
        (Path(name) / "first").mkdir()
        search_nothing(2, Path(name) / "first", SearchObserver())
        for trials in numbers:
            folder = Path(name) / str(trials)
            (folder / "journal").mkdir(parents=True)
            alone, _ = search_nothing(trials, folder / "journal", SearchObserver())
            held = resident_mib()
            uri = default_uri(folder)
            experiment = connect(uri, "trials of nothing", folder)
            tracker = Tracker(uri, experiment, folder / "tracking.jsonl")
            (folder / "mlflow").mkdir()
            recorded, epochs = search_nothing(trials, folder / "mlflow", Recorder(tracker))
            closing = time.perf_counter()
            tracker.close(timeout=600.0)
            closing = time.perf_counter() - closing
            print(
                f"{trials} trials, {epochs} epochs: {alone:.1f} s, {alone / trials:.3f} s a trial, "
                f"{held:.0f} MiB; with MLflow {recorded:.1f} s, {recorded / trials:.3f} s a trial, "
                f"{resident_mib():.0f} MiB, and {closing:.1f} s to send the rest",
                flush=True,
            )


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
