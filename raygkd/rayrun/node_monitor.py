"""Monitor the nodes of the cluster during a run: load, and nodes that join or are lost."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psutil

from raygkd.errors import ResourceError
from raygkd.rayrun import references
from raygkd.rayrun.loopback import ADDRESS

if TYPE_CHECKING:
    from ray.actor import ActorHandle

# from the start to the first sample, and from one to the next
FIRST_SECONDS, SECONDS = 2.0, 10.0
# that nodes have to answer
ANSWER_SECONDS = 2.0
# that a node needs to start a process which can look
LOOK_SECONDS = 60.0
_MIB = float(1 << 20)
# id and address of this machine without a cluster
_ALONE = {"here": ADDRESS}


class NodeLoad:
    """The load of a node; the names are those of MLflow's system metrics."""

    def __init__(self) -> None:
        # from here on they are measured
        psutil.cpu_percent()
        self._network = psutil.net_io_counters()

    def sample(self) -> dict[str, float]:
        """Return the load since the previous sample; memory and network in MiB."""
        memory, network, before = psutil.virtual_memory(), psutil.net_io_counters(), self._network
        self._network = network
        return {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MIB,
            "system_memory_usage_percentage": memory.percent,
            "network_receive_megabytes": (network.bytes_recv - before.bytes_recv) / _MIB,
            "network_transmit_megabytes": (network.bytes_sent - before.bytes_sent) / _MIB,
            **_gpu_load(),
        }


def _gpu_load() -> dict[str, float]:
    """Return the load of each NVIDIA GPU; empty without GPUs."""
    import pynvml

    load: dict[str, float] = {}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return load
    for number in range(pynvml.nvmlDeviceGetCount()):
        gpu = pynvml.nvmlDeviceGetHandleByIndex(number)
        memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
        load |= {
            f"gpu_{number}_utilization_percentage": pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
            f"gpu_{number}_memory_usage_megabytes": memory.used / _MIB,
            f"gpu_{number}_memory_usage_percentage": 100 * memory.used / memory.total,
        }
    return load


def alive() -> dict[str, str]:
    """Return id -> address of all current nodes; of this machine without a cluster."""
    if not references.is_open():
        return dict(_ALONE)
    import ray

    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def _here() -> str:
    """Return the id of this node."""
    if not references.is_open():
        return next(iter(_ALONE))
    import ray

    return ray.get_runtime_context().get_node_id()


def _on_node(node: str) -> dict[str, Any]:
    """Return options of a task or actor on a node that takes no resources."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {
        "num_cpus": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
    }


def require_shared(option: str, place: Path, witness: Path) -> None:
    """Refuse a local path that another node does not see.

    Args:
        option: that names it.
        place: the path.
        witness: a file in it.

    Raises:
        ResourceError: with a node that does not see the witness as this one does.
    """
    import ray

    here = _here()
    look = ray.remote(_size)
    seen = {
        address: look.options(**_on_node(node)).remote(witness)
        for node, address in alive().items()
        if node != here
    }
    for address, size in seen.items():
        if ray.get(size, timeout=LOOK_SECONDS) != _size(witness):
            raise ResourceError(
                f"{option} {place}: node {address} of the cluster does not see it; choose a path "
                "on storage that all nodes share (such as NFS), or s3://BUCKET/PATH"
            )


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def _load_of(node: str) -> ActorHandle:
    """Return an actor on a node that samples its load."""
    import ray

    return ray.remote(NodeLoad).options(**_on_node(node)).remote()


class NodeWatch:
    """Samples the nodes in a thread during a run, and reports those that join or are lost.

    Args:
        record: is called with "system/ADDRESS/NAME" -> number, and the seconds since the start.
        tell: shows a line.
    """

    def __init__(
        self, record: Callable[[dict[str, float], int], None], tell: Callable[[str], None]
    ):
        self._record, self._tell = record, tell
        self._over = threading.Event()
        self._here = _here()
        self._load = NodeLoad()
        self._nodes = alive()
        self._elsewhere: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._watch, name="node-watch", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        # before Ray is shut down: a thread that waits for it then ends the process
        self._thread.join()

    def _watch(self) -> None:
        started = time.monotonic()
        for pause in itertools.chain([FIRST_SECONDS], itertools.repeat(SECONDS)):
            if self._over.wait(pause):
                return
            self._compare(alive())
            self._record(self._samples(), int(time.monotonic() - started))

    def _compare(self, now: dict[str, str]) -> None:
        """Report lost and new nodes."""
        before, self._nodes = self._nodes, now
        for node in before.keys() - now.keys():
            self._elsewhere.pop(node, None)
            self._tell(
                f"node {before[node]} is lost: its runs resume after their last epoch as soon as "
                "there is room"
            )
        for node in now.keys() - before.keys():
            self._tell(f"node {now[node]} has joined")

    def _samples(self) -> dict[str, float]:
        """Return the load of every node that responds."""
        for node in self._nodes.keys() - self._elsewhere.keys() - {self._here}:
            self._elsewhere[node] = _load_of(node)
        samples = {self._here: self._load.sample(), **self._samples_elsewhere()}
        return {
            f"system/{self._nodes[node]}/{name}": value
            for node, sample in samples.items()
            for name, value in sample.items()
        }

    def _samples_elsewhere(self) -> dict[str, dict[str, float]]:
        asked = {load.sample.remote(): node for node, load in self._elsewhere.items()}
        if not asked:
            return {}
        import ray

        answered, _ = ray.wait([*asked], num_returns=len(asked), timeout=ANSWER_SECONDS)
        samples = {}
        for reference in answered:
            try:
                samples[asked[reference]] = ray.get(reference)
            except ray.exceptions.RayError:
                # the node is being lost, which is reported once Ray is sure of it
                del self._elsewhere[asked[reference]]
        return samples
