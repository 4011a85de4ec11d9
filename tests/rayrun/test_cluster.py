"""How many runs fit on a cluster, and what is said when none does; made-up nodes, no Ray."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raygkd.config import ClusterConfig, WorkerRange
from raygkd.errors import ResourceError
from raygkd.rayrun.cluster import (
    Resources,
    is_joined,
    local_node,
    places,
    require_room,
    run_bundles,
    worker_cpus,
)


def node(cpus: float, gpus: float = 0.0) -> Resources:
    return {"CPU": cpus, "GPU": gpus}


def fitting(
    nodes: list[Resources], workers: int, cpus: float, gpus: float = 0.0, data_cpus: float = 0.0
) -> int:
    """Return how many runs of some workers fit."""
    bundles = run_bundles(ClusterConfig(gpus_per_worker=gpus), cpus, workers)
    return places(nodes, bundles, data_cpus=data_cpus)


@pytest.mark.parametrize(
    ("nodes", "workers", "cpus", "gpus", "data_cpus", "runs"),
    [
        ([node(2)], 1, 1, 0, 0, 2),
        ([node(2)], 2, 1, 0, 0, 1),
        ([node(2)], 3, 1, 0, 0, 0),
        # fractions
        ([node(2)], 2, 0.5, 0, 0, 2),
        ([node(1)], 10, 0.1, 0, 0, 1),
        ([node(1)], 1, 0.1, 0, 0, 10),
        # spread: a worker needs one node to itself, a run does not
        ([node(1), node(1)], 2, 1, 0, 0, 1),
        ([node(3), node(3)], 2, 2, 0, 0, 1),
        ([node(3), node(3)], 1, 4, 0, 0, 0),
        ([node(1), node(4), node(2)], 3, 1, 0, 0, 2),
        # the data stream takes one CPU of some node
        ([node(2)], 1, 1, 0, 1, 1),
        ([node(2)], 2, 0.5, 0, 1, 1),
        ([node(1)], 1, 1, 0, 1, 0),
        ([node(2), node(1)], 1, 2, 0, 1, 1),
        ([node(0.5), node(0.5)], 1, 0.5, 0, 1, 0),
        # GPUs, where either resource can be the scarce one
        ([node(16, 2)], 1, 1, 1, 0, 2),
        ([node(16, 2)], 1, 1, 0.5, 0, 4),
        ([node(2, 8)], 2, 1, 1, 0, 1),
        # a share of a GPU lies on one GPU
        ([node(16, 3)], 1, 1, 0.75, 0, 3),
        ([node(16, 1)], 1, 1, 0.4, 0, 2),
        ([node(16, 1)], 1, 1, 0.1, 0, 10),
        ([node(64), node(4, 4)], 4, 1, 1, 0, 1),
        ([node(64), node(4, 4)], 4, 1, 1, 1, 1),
        ([], 1, 1, 0, 0, 0),
    ],
)
def test_runs_that_fit_at_the_same_time(
    nodes: list[Resources], workers: int, cpus: float, gpus: float, data_cpus: float, runs: int
) -> None:
    assert fitting(nodes, workers, cpus, gpus, data_cpus) == runs


quarters = st.integers(1, 16).map(lambda quarter: quarter / 4)
clusters = st.lists(st.builds(node, quarters, st.integers(0, 2)), min_size=1, max_size=3)


@given(
    nodes=clusters,
    workers=st.integers(1, 4),
    cpus=quarters,
    gpus=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    data_cpus=st.sampled_from([0.0, 1.0]),
)
def test_as_many_runs_fit_as_the_best_of_all_placements_holds(
    nodes: list[Resources], workers: int, cpus: float, gpus: float, data_cpus: float
) -> None:
    def holds(of: Resources, taken: float) -> int:
        """Count the workers of one node by adding them, in whole quarters."""
        free = round(4 * (of["CPU"] - taken))
        for count in itertools.count():
            if (count + 1) * 4 * cpus > free or (count + 1) * gpus > of["GPU"]:
                return count
        raise AssertionError

    best = 0
    for data in range(len(nodes)):
        if nodes[data]["CPU"] >= data_cpus:
            held = [holds(n, data_cpus if i == data else 0.0) for i, n in enumerate(nodes)]
            best = max(best, sum(held) // workers)
    assert fitting(nodes, workers, cpus, gpus, data_cpus) == best


def test_asking_changes_no_node() -> None:
    nodes = [node(2), node(4)]
    fitting(nodes, 2, 1, data_cpus=1)
    assert nodes == [node(2), node(4)]


@pytest.mark.parametrize(
    ("nodes", "config", "data_cpus", "words"),
    [
        (
            [node(2)],
            ClusterConfig(workers=WorkerRange(3, 3)),
            0.0,
            "3 worker(s) with 1 CPU and 0 GPU each; the cluster has 2 CPU and 0 GPU on 1 node(s); "
            "add nodes, or lower --workers or --cpus-per-worker",
        ),
        (
            [node(1), node(1)],
            ClusterConfig(workers=WorkerRange(1, 1), cpus_per_worker=1.5),
            0.0,
            "1 worker(s) with 1.5 CPU and 0 GPU each; the cluster has 2 CPU and 0 GPU on 2 node(s)",
        ),
        (
            [node(8, 1)],
            ClusterConfig(workers=WorkerRange(2, 2), gpus_per_worker=1.0),
            0.0,
            "has 8 CPU and 1 GPU on 1 node(s); add nodes, or lower --workers or --gpus-per-worker",
        ),
        ([node(1)], ClusterConfig(), 1.0, "0 GPU each and 1 CPU for the data stream; the cluster"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_is_missing(
    nodes: list[Resources], config: ClusterConfig, data_cpus: float, words: str
) -> None:
    bundles = run_bundles(config, config.cpus_per_worker or 1.0, config.workers.least)
    with pytest.raises(ResourceError) as refused:
        require_room(nodes, bundles, data_cpus=data_cpus)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_fits_is_not_refused() -> None:
    assert require_room([node(8)], run_bundles(ClusterConfig(), 1.0, 3), data_cpus=1.0) == 2


@pytest.mark.parametrize(
    ("nodes", "config", "data_cpus", "cpus"),
    [
        ([node(8)], ClusterConfig(), 0.0, 8.0),
        ([node(8)], ClusterConfig(workers=WorkerRange(2, 2)), 0.0, 4.0),
        ([node(8)], ClusterConfig(workers=WorkerRange(2, 2)), 1.0, 3.0),
        ([node(8), node(4)], ClusterConfig(workers=WorkerRange(2, 2)), 0.0, 4.0),
        ([node(8), node(4)], ClusterConfig(workers=WorkerRange(3, 3)), 0.0, 2.0),
        ([node(2)], ClusterConfig(workers=WorkerRange(4, 4)), 0.0, 1.0),
        ([node(8)], ClusterConfig(workers=WorkerRange(2, 2), cpus_per_worker=0.5), 1.0, 0.5),
        ([node(8, 2)], ClusterConfig(workers=WorkerRange(2, 2), gpus_per_worker=1.0), 0.0, 1.0),
    ],
)
def test_workers_share_a_cluster_that_they_have_for_themselves(
    nodes: list[Resources], config: ClusterConfig, data_cpus: float, cpus: float
) -> None:
    assert worker_cpus(config, nodes, data_cpus=data_cpus) == cpus


@given(
    nodes=st.lists(st.builds(node, st.integers(1, 8)), min_size=1, max_size=3),
    workers=st.integers(1, 6),
    data_cpus=st.sampled_from([0.0, 1.0]),
)
def test_a_share_fits_wherever_one_cpu_does(
    nodes: list[Resources], workers: int, data_cpus: float
) -> None:
    share = worker_cpus(
        ClusterConfig(workers=WorkerRange(workers, workers)), nodes, data_cpus=data_cpus
    )
    assert share == math.floor(share) >= 1
    fits_by_ones = fitting(nodes, workers, 1.0, data_cpus=data_cpus) > 0
    assert (fitting(nodes, workers, share, data_cpus=data_cpus) > 0) == fits_by_ones


def test_a_cluster_is_joined_where_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not is_joined(None)
    assert local_node()["CPU"] >= 1
    assert is_joined("10.0.0.1:6379")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert is_joined(None)
