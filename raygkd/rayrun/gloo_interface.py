"""Choose the network interface of a run's workers: that of their nodes' Ray addresses."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import psutil
import ray.util
from ray.train.torch.config import TorchConfig

from raygkd.rayrun.ray_internals import TorchBackend

INTERFACE = "GLOO_SOCKET_IFNAME"


@dataclass
class NodeNetwork(TorchConfig):
    """Ray's process group, over the network of the nodes' own addresses.

    Gloo uses the address of the node's hostname, which on many systems is 127.0.1.1, so that
    workers on other nodes cannot connect. NCCL finds the interface itself.
    """

    @property
    def backend_cls(self) -> Any:
        """The class that sets up the process group."""
        return _OverNodeNetwork


class _OverNodeNetwork(TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(use_node_network)
        super().on_start(worker_group, backend_config)


def use_node_network() -> None:
    """Choose the interface with this node's address, unless the environment names one."""
    address = ray.util.get_node_ip_address()
    for interface, parts in psutil.net_if_addrs().items():
        if address in {part.address for part in parts}:
            os.environ.setdefault(INTERFACE, interface)
