"""How trials are drawn and stopped, and trials of two workers each, two at the same time."""

from __future__ import annotations

import contextlib
import math
import random
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.tune import with_parameters
from ray.util import placement_group_table
from records import without_times

from raygkd.assembly.models import untrained_file
from raygkd.config import (
    ClusterConfig,
    Config,
    ModelConfig,
    OptimConfig,
    SearchConfig,
    WorkerRange,
    with_settings,
)
from raygkd.config.search_space import Dimension
from raygkd.data.run_images import Images
from raygkd.engine import read_checkpoint
from raygkd.rayrun.cluster import Resources
from raygkd.rayrun.image_stream import share
from raygkd.rayrun.search_history import SearchObserver, Trial
from raygkd.rayrun.searchers import scheduler, searcher
from raygkd.rayrun.stop_signal import StopFolder
from raygkd.rayrun.trainables import WarmTrial
from raygkd.rayrun.tune_search import TrialResult, numbers, run_search
from raygkd.rayrun.worker import METRIC, Job, make_job

import psutil  # type: ignore[import-untyped]  # isort: skip  (ray brings it along)

EPOCHS, GRACE = 3, 2
SPACE = (Dimension("lr", "choice", (0.05, *[1e-9] * 4, 1e30)),)
# seeds that draw 0.05, 1e30, 0.05, 1e-9; and ten of which the first two are 0.05 and one is 1e30
SEEDS = {4: 4662, 10: 524}
# titles of the processes that train, and of the others that a trial of several has
TRIALS, WORKERS = "ray::ResourceTrainable", "ray::RayTrainWorker"
OTHERS = ("ray::TrainController", "ray::DistributedTrial", "ray::Mailbox")


@dataclass
class Recorder(SearchObserver):
    """Keeps what a search tells."""

    params: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    epochs: dict[int, list[Mapping[str, float]]] = field(default_factory=dict)
    over: dict[int, str] = field(default_factory=dict)

    def started(self, trial: Trial) -> None:
        self.params[trial.number] = trial.params

    def reported(self, trial: Trial, metrics: Mapping[str, float]) -> None:
        self.epochs.setdefault(trial.number, []).append(metrics)

    def ended(self, trial: Trial) -> None:
        self.over[trial.number] = trial.status


def job_of(config: Config, images: Images, folder: Path) -> Job:
    """Return the job of a search in a folder, with an untrained teacher."""
    return make_job(
        config,
        share(images, cache_mb=64),
        untrained_file("resnet8", images.spec),
        folder=folder,
        stop=StopFolder(folder / "stop"),
    )


@dataclass(frozen=True)
class Searched:
    """Trials, two at a time.

    Attributes:
        trials: how they went, the best first.
        told: what the observer was told.
        most_processes: how many that train were alive at the same time.
        seconds: from the end of the search until all that it had taken was free again.
        left: what was not, after that.
    """

    trials: list[TrialResult]
    told: Recorder
    most_processes: int
    seconds: float
    left: dict[str, Any]


def taken(before: Mapping[str, float]) -> dict[str, Any]:
    """Return what a search holds of the cluster: placement groups, processes, resources."""
    groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    now = ray.available_resources()
    missing = {name: before[name] - now.get(name, 0.0) for name in ("CPU", "memory")}
    held = {name: amount for name, amount in missing.items() if amount > 1e-3}
    titles = list(processes(TRIALS, WORKERS, *OTHERS).values())
    parts = {"groups": len(groups), "processes": titles, **held}
    return {name: part for name, part in parts.items() if part}


def processes(*titles: str) -> dict[psutil.Process, str]:
    """Return the processes of this one's cluster whose titles begin with one of some -> titles."""
    found = {}
    # commands that are played in the background have clusters of their own
    roots = [child for child in psutil.Process().children() if not is_command(child)]
    for process in [process for root in roots for process in descendants(root)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            for title in process.cmdline()[:1]:
                if title.startswith(titles):
                    found[process] = title.split()[0]
    return found


def is_command(process: psutil.Process) -> bool:
    """Return whether a child of this process is a command line."""
    try:
        return "raygkd" in process.cmdline()
    except psutil.NoSuchProcess:
        return False


def descendants(root: psutil.Process) -> list[psutil.Process]:
    """Return the processes below one, which may be gone."""
    try:
        return root.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def search(
    images: Images, folder: Path, cluster: ClusterConfig, trials: int, seed: int
) -> Searched:
    """Run trials of three epochs, two at a time; all but two are stopped before the third.

    Of trials of several workers one worker is killed after the first epoch.
    """
    config = Config(
        model=ModelConfig(teacher="resnet8", student="resnet8"),
        optim=OptimConfig(epochs=EPOCHS, batch_size=16, seed=seed),
        cluster=cluster,
        search=SearchConfig(trials=trials, grace_period=GRACE, reduction_factor=10),
    )
    recorder = Recorder()
    job = job_of(config, images, folder)
    before = ray.cluster_resources()
    counts: list[int] = []
    over = threading.Event()

    def watch() -> None:
        to_kill = int(cluster.workers.most > 1)
        while not over.wait(0.3):
            training = processes(TRIALS if cluster.workers.most == 1 else WORKERS)
            counts.append(len(training))
            if to_kill and recorder.epochs and training:
                random.choice(list(training)).kill()
                to_kill -= 1

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        found = run_search(job, config, SPACE, cpus=0.5, concurrent=2, observer=recorder)
    finally:
        over.set()
        watcher.join()
    ended = time.monotonic()
    while taken(before) and time.monotonic() < ended + 60:
        time.sleep(0.2)
    return Searched(found, recorder, max(counts), time.monotonic() - ended, taken(before))


@pytest.fixture(scope="module")
def searched(
    digits: Images, nodes: list[Resources], tmp_path_factory: pytest.TempPathFactory
) -> Searched:
    """Four trials of two workers with half a CPU each; one of the workers is killed."""
    cluster = ClusterConfig(workers=WorkerRange(2, 2), cpus_per_worker=0.5)
    return search(digits, tmp_path_factory.mktemp("search"), cluster, 4, SEEDS[4])


@pytest.fixture(scope="module")
def warm(
    digits: Images, nodes: list[Resources], tmp_path_factory: pytest.TempPathFactory
) -> Searched:
    """Ten trials of one process each, in two actors."""
    return search(digits, tmp_path_factory.mktemp("warm"), ClusterConfig(), 10, SEEDS[10])


def test_trials_of_two_workers_end_and_are_ranked(searched: Searched) -> None:
    trials = searched.trials
    assert [trial.params["lr"] for trial in trials] == [0.05, 0.05, 1e-9, 1e30]
    assert [trial.status for trial in trials] == ["finished", "finished", "stopped", "diverged"]
    assert [trial.epochs for trial in trials] == [EPOCHS, EPOCHS, GRACE, 1]
    assert (trials[0].val_score or 0.0) > 0.15
    assert trials[-1].val_score == 0.0


def test_eight_of_ten_trials_are_stopped_and_a_diverging_one_blocks_nobody(warm: Searched) -> None:
    assert [trial.params["lr"] for trial in warm.trials] == [0.05, 0.05, *[1e-9] * 7, 1e30]
    statuses = [trial.status for trial in warm.trials]
    assert statuses == ["finished", "finished", *["stopped"] * 7, "diverged"]
    assert [trial.epochs for trial in warm.trials] == [EPOCHS, EPOCHS, *[GRACE] * 7, 1]
    # it was not the last one
    assert warm.trials[-1].number == 8


@pytest.mark.parametrize(("name", "most"), [("searched", 4), ("warm", 2)])
def test_trials_that_are_stopped_free_workers_placement_groups_and_memory(
    request: pytest.FixtureRequest, name: str, most: int
) -> None:
    found: Searched = request.getfixturevalue(name)
    assert found.most_processes == most
    assert (found.left, found.seconds < 30) == ({}, True)


def test_a_trial_of_two_workers_is_one_run_of_two_ranks(
    searched: Searched,
) -> None:
    best = searched.trials[0]
    assert best.checkpoint is not None
    state = read_checkpoint(best.checkpoint)
    assert state["epoch"] == EPOCHS
    ranks = [rank["cpu"] for rank in state["rng"]]
    assert len(ranks) == 2
    assert not torch.equal(*ranks)


def test_every_epoch_of_every_trial_is_told_with_finite_numbers(
    searched: Searched,
) -> None:
    trials, told = searched.trials, searched.told
    assert told.over == {trial.number: trial.status for trial in trials}
    for trial in trials:
        epochs = told.epochs[trial.number]
        assert told.params[trial.number] == trial.params
        assert [metrics["epoch"] for metrics in epochs] == list(range(1, trial.epochs + 1))
        assert epochs[-1]["val_score"] == trial.val_score
        assert all(math.isfinite(value) for metrics in epochs for value in metrics.values())
    learnt = told.epochs[trials[0].number]
    terms = {"loss_task", "loss_vertex", "factor_vertex"}
    assert all(terms <= set(metrics) for metrics in learnt)


def test_a_trial_of_two_workers_does_not_depend_on_those_before_nor_on_a_lost_worker(
    searched: Searched,
) -> None:
    params, epochs = searched.told.params, searched.told.epochs
    assert params[0] == params[2]
    first, third = ([without_times(metrics) for metrics in epochs[trial]] for trial in (0, 2))
    assert first == third
    assert [metrics["epoch"] for metrics in epochs[1]] == [1]


@pytest.mark.parametrize(
    "before",
    [
        {"lr": 0.2, "batch_size": 16, "levels": [1], "dim": 2, "gamma": 0.0, "clip_norm": 1.0},
        {"lr": 1e30, "alpha": 0.5},
    ],
    ids=["another", "one that diverged"],
)
def test_a_trial_does_not_depend_on_the_one_that_its_process_ran_before(
    digits: Images, nodes: list[Resources], before: dict[str, Any], tmp_path: Path
) -> None:
    config = Config(
        model=ModelConfig(teacher="resnet8", student="resnet8"), optim=OptimConfig(epochs=2)
    )
    warm_trial = with_parameters(WarmTrial, job=job_of(config, digits, tmp_path))
    params = {"lr": 0.05, "levels": [2, 3], "temperature": 0.3}
    fresh = warm_trial({"trial": 0, "params": params})
    used = warm_trial({"trial": 1, "params": before})
    try:
        used.train()
        assert used.reset({"trial": 2, "params": params})
        for _ in range(2):
            expected, found = (without_times(numbers(trial.train())) for trial in (fresh, used))
            assert found == expected
        assert found["epoch"] == 2
    finally:
        fresh.stop()
        used.stop()


@pytest.mark.parametrize(
    ("settings", "rungs"),
    [
        ({}, [[1, 3, 9, 27]]),
        ({"grace_period": 2, "reduction_factor": 4}, [[2, 8]]),
        ({"scheduler": "hyperband"}, [[1, 3, 9, 27], [3, 9, 27], [9, 27]]),
        ({"scheduler": "hyperband", "grace_period": 10}, [[10]]),
        ({"scheduler": "none"}, []),
    ],
)
def test_a_trial_can_be_stopped_at_the_rungs_of_its_bracket(
    settings: dict[str, Any], rungs: list[list[int]]
) -> None:
    config = with_settings(Config(optim=OptimConfig(epochs=27)), settings)
    brackets = scheduler(config).debug_string().split("Bracket:")[1:]
    found = [sorted(int(rung) for rung in re.findall(r"Iter (\d+)", b)) for b in brackets]
    assert found == rungs


def test_tpe_draws_more_of_what_has_scored_well() -> None:
    config = with_settings(Config(), {"searcher": "tpe", "seed": 3})
    space = (
        Dimension("levels", "choice", ([1], [2, 3], [1, 2, 3])),
        Dimension("lr", "loguniform", (1e-4, 1.0)),
    )
    tpe = searcher(config, space)
    drawn = []
    for trial in map(str, range(60)):
        drawn.append(tpe.suggest(trial))
        score = -abs(math.log10(drawn[-1]["lr"] / 0.01)) - (drawn[-1]["levels"] != [2, 3])
        tpe.on_trial_complete(trial, {METRIC: score})
    right = [params["levels"] == [2, 3] and 1e-3 < params["lr"] < 0.1 for params in drawn]
    # of 20 that are drawn by themselves it is about 3
    assert sum(right[-20:]) >= 9
    assert searcher(config, space).suggest("0") == drawn[0]
