"""The Ray cluster: start or join one, and compute how many trials fit at once."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from raygkd.config import ClusterConfig
from raygkd.errors import ConfigError, ResourceError
from raygkd.rayrun.local_machine import (
    ClusterWatch,
    check_limits,
    session_folder,
    temporary_files_in,
)
from raygkd.rayrun.loopback import ADDRESS, on_loopback

# What a report costs is the controller's poll interval, and what a run costs is the start of its
# helper processes; the ones switched off here serve preemption notices and Prometheus. The start
# timeout turns a worker group that can never be placed into an error.
TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
}
TUNE_ENVIRONMENT = {
    # what Tune would resume by is not used, and to copy it while it is written may fail
    "TUNE_GLOBAL_CHECKPOINT_S": "inf",
    # the command line closes MLflow runs on Ctrl-C itself
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}
PROBE_SECONDS = 10.0
# from one look for room to the next
ROOM_SECONDS = 1.0
# names of the threads that read data sets through Ray, and how long each may take to end
DATA_THREADS, DATA_SECONDS = ("StreamingExecutor", "iter_threaded"), 30.0
Resources = dict[str, float]


def local_node() -> Resources:
    """Return the resources of a cluster of only this machine."""
    import torch

    return {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}


@contextlib.contextmanager
def cluster(address: str | None) -> Iterator[list[Resources]]:
    """Start Ray on this machine, or join a running cluster; yield the resources of each node.

    A session that the process has opened to the cluster is used and stays open.

    Args:
        address: of a running cluster ("auto", "host:port", "ray://..."); None starts one here.

    Raises:
        ConfigError: the process has a session of another cluster.
        ResourceError: no cluster answers at the address, or Ray does not start.
    """
    os.environ.update({**TRAIN_ENVIRONMENT, **TUNE_ENVIRONMENT, **os.environ})
    import ray

    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    source = "omit --address" if address else "unset RAY_ADDRESS"
    address = _address(address)
    if ray.is_initialized():
        if address != ray.get_runtime_context().gcs_address:
            raise ConfigError(
                f"--address {address}: this process has a Ray session of another cluster; omit "
                "the address to use it, or call ray.shutdown() first"
            )
        _quieten()
        yield _nodes()
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with contextlib.ExitStack() as stack:
        if address is None:
            check_limits()
            options["_temp_dir"] = str(stack.enter_context(session_folder()))
        try:
            _start(address, options)
        # Ray raises bare ones, where its dashboard does not start
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            if address is None:
                told = f"Ray does not start on this machine: {reason}; see 'raygkd doctor'"
            else:
                told = (
                    f"no Ray cluster at {address}: {reason}; start one with 'ray start --head', or "
                    f"{source}"
                )
            raise ResourceError(told) from error
        # Ray has put its own in the place, which exits without a word
        signal.signal(signal.SIGTERM, on_sigterm)
        _quieten()
        watch = ClusterWatch() if address is None else None
        try:
            with contextlib.nullcontext() if watch is None else watch.watching():
                yield _nodes()
        finally:
            if watch is not None and watch.lost:
                watch.end_all()
            else:
                _wait_for_data()
            ray.shutdown()


def _address(given: str | None) -> str | None:
    """Return the address of the cluster to join, or None to start one."""
    address = given or os.environ.get("RAY_ADDRESS")
    return None if address in ("", "local") else address


def _start(address: str | None, options: Mapping[str, Any]) -> None:
    """Start a cluster of this machine, or join a running one."""
    import ray

    if address is None:
        with on_loopback(), temporary_files_in(Path(options["_temp_dir"])):
            # "local", or one that someone else has started here would be joined. The dashboard's
            # state API is what frees the placement groups of stopped trials
            ray.init(address="local", include_dashboard=True, dashboard_host=ADDRESS, **options)
        return
    _probe(address)
    # a cluster that is started here has this process's environment
    known = {"RAY_ADDRESS": address} if address.rpartition(":")[2].isdigit() else {}
    ray.init(address=address, runtime_env={"env_vars": TRAIN_ENVIRONMENT | known}, **options)


def _quieten() -> None:
    """Keep Ray's libraries from reporting what the run reports itself."""
    for name in ("ray.data", "ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("ray.tune.execution.tune_controller").addFilter(_is_no_lost_process)


def _wait_for_data() -> None:
    """Wait for the threads of Ray Data, which end the process if they outlive Ray."""
    for thread in threading.enumerate():
        if thread.name.startswith(DATA_THREADS):
            thread.join(DATA_SECONDS)


@contextlib.contextmanager
def cluster_if(
    is_needed: bool, address: str | None, *, gpus: float = 0.0
) -> Iterator[list[Resources]]:
    """Join the cluster of an address, or start one if it is needed; yield the nodes' resources.

    Args:
        is_needed: whether this process alone does not do.
        address: as for ``cluster``.
        gpus: that a task will need, from 0 to 1.

    Raises:
        ResourceError: see ``cluster``; or there is no such GPU.
    """
    bundles: list[Resources] = [{"CPU": 0.0, "GPU": gpus}]
    if not is_joined(address):
        require_room([local_node()], bundles, data_cpus=0.0)
    if is_needed or is_joined(address):
        with cluster(address) as nodes:
            require_room(nodes, bundles, data_cpus=0.0)
            yield nodes
    else:
        yield [local_node()]


def probe(address: str | None, seconds: float = 60.0) -> list[Resources]:
    """Start or join a cluster, run a task, and leave it; return the resources of each node.

    Args:
        address: as for ``cluster``.
        seconds: timeout of the task.

    Raises:
        ResourceError: no cluster answers at the address, or it does not run the task.
    """
    with cluster(address) as nodes:
        import ray

        try:
            ray.get(ray.remote(num_cpus=1)(_nothing).remote(), timeout=seconds)
        except ray.exceptions.RayError as error:
            reason = str(error).strip().partition("\n")[0]
            raise ResourceError(f"the Ray cluster does not run a task: {reason}") from error
        return nodes


def _nothing() -> None:
    pass


def _nodes() -> list[Resources]:
    """Return the resources of each node of the cluster."""
    import ray

    return [
        {kind: node["Resources"].get(kind, 0.0) for kind in ("CPU", "GPU")}
        for node in ray.nodes()
        if node["Alive"]
    ]


def wait_for_room(
    bundles: Sequence[Resources], *, minutes: float, tell: Callable[[str], None]
) -> list[Resources]:
    """Request missing resources; return the nodes once a run fits, or after the wait.

    Args:
        bundles: of one run.
        minutes: maximum wait.
        tell: shows a line.
    """
    from ray.autoscaler.sdk import request_resources

    deadline = time.monotonic() + 60 * minutes
    nodes = _nodes()
    if _runs(nodes, bundles) or not minutes:
        return nodes
    tell(f"no room yet: requesting nodes, waiting at most {minutes:g} minutes")
    request_resources(
        bundles=[{kind: amount for kind, amount in bundle.items() if amount} for bundle in bundles]
    )
    try:
        while not _runs(nodes, bundles) and time.monotonic() < deadline:
            time.sleep(ROOM_SECONDS)
            nodes = _nodes()
    finally:
        # a request stays in force, and would keep nodes that nobody needs
        request_resources(bundles=[])
    return nodes


def _is_no_lost_process(record: logging.LogRecord) -> bool:
    """Return whether a log record is not Tune's traceback of a lost process.

    A lost process is reported in a line of our own.
    """
    from ray.exceptions import RayActorError

    return record.exc_info is None or not isinstance(record.exc_info[1], RayActorError)


def _probe(address: str) -> None:
    """Raise the error of connecting to "host:port"; Ray itself would retry for minutes."""
    if address.startswith(("http://", "https://")):
        raise ValueError("it is the URL of a dashboard, not HOST:PORT")
    if address == "auto":
        from ray._private.services import canonicalize_bootstrap_address

        # Ray knows clusters by their processes: those that are ending, or on loopback only, too
        address = str(canonicalize_bootstrap_address(address))
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=PROBE_SECONDS).close()


def is_joined(address: str | None) -> bool:
    """Return whether to join a running cluster instead of starting one on this machine."""
    return _address(address) is not None


def run_bundles(config: ClusterConfig, cpus: float, workers: int) -> list[Resources]:
    """Return the resources of a run: one bundle per worker."""
    return [{"CPU": cpus, "GPU": config.gpus_per_worker}] * workers


def worker_cpus(config: ClusterConfig, nodes: Sequence[Resources], *, data_cpus: float) -> float:
    """Return the CPUs per worker of a run that has the cluster to itself.

    This is ``--cpus-per-worker`` if given; otherwise 1 with GPUs, and without GPUs an even share of
    the smallest node's CPUs among the maximum number of workers.
    """
    if config.cpus_per_worker is not None:
        return config.cpus_per_worker
    if config.gpus_per_worker:
        return 1.0
    per_node = -(-config.workers.most // len(nodes))
    return max(1.0, float((min(node["CPU"] for node in nodes) - data_cpus) // per_node))


def places(nodes: Sequence[Resources], bundles: Sequence[Resources], *, data_cpus: float) -> int:
    """Return how many runs fit at the same time, each with all its bundles.

    Every bundle must fit on one node. ``data_cpus`` stay free for image decoding, on the node where
    that costs the fewest runs.
    """
    if not data_cpus:
        return _runs(nodes, bundles)
    # it makes no difference which of several equal nodes it is
    kinds = {tuple(node.items()): i for i, node in enumerate(nodes) if node["CPU"] >= data_cpus}
    return max(
        (
            _runs([*nodes[:i], {**node, "CPU": node["CPU"] - data_cpus}, *nodes[i + 1 :]], bundles)
            for i, node in ((i, nodes[i]) for i in kinds.values())
        ),
        default=0,
    )


def _runs(nodes: Sequence[Resources], bundles: Sequence[Resources]) -> int:
    if not any(sum(bundle.values()) for bundle in bundles):
        # what needs nothing always fits
        return 1
    free = [dict(node) for node in nodes]
    runs = 0
    while all(_place(free, bundle) for bundle in bundles):
        runs += 1
    return runs


def _place(free: list[Resources], bundle: Resources) -> bool:
    gpus = bundle["GPU"]
    if 0 < gpus < 1:
        # a share is of one GPU: where 0.4 is taken twice, no third one fits
        bundle = {**bundle, "GPU": 1 / int(1 / gpus + 1e-6)}
    for node in free:
        # resources are counted in steps of 1e-4
        if all(node[kind] + 1e-6 >= amount for kind, amount in bundle.items()):
            for kind, amount in bundle.items():
                node[kind] -= amount
            return True
    return False


def require_room(
    nodes: Sequence[Resources], bundles: Sequence[Resources], *, data_cpus: float
) -> int:
    """Return ``places``, or raise an error if it is 0.

    Raises:
        ResourceError: not even one run fits; states what is missing.
    """
    fitting = places(nodes, bundles, data_cpus=data_cpus)
    if fitting:
        return fitting
    has = {kind: sum(node[kind] for node in nodes) for kind in ("CPU", "GPU")}
    each = bundles[0]
    stream = f" and {data_cpus:g} CPU for the data stream" if data_cpus else ""
    remedy = "add nodes, or lower --workers"
    if each["GPU"] * len(bundles) > has["GPU"]:
        remedy += " or --gpus-per-worker"
    else:
        remedy += " or --cpus-per-worker (fractions such as 0.5 are allowed)"
    raise ResourceError(
        f"a run needs {len(bundles)} worker(s) with {each['CPU']:g} CPU and {each['GPU']:g} GPU "
        f"each{stream}; the cluster has {has['CPU']:g} CPU and {has['GPU']:g} GPU on {len(nodes)} "
        f"node(s); {remedy}"
    )
