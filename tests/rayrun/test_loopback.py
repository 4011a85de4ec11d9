"""A cluster of this machine cannot be reached from another."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Iterator

import pytest
import ray

from raygkd.rayrun.cluster import cluster

import psutil  # type: ignore[import-untyped]  # isort: skip  (ray brings it along)

# processes of a cluster that has run a task
PROCESSES = {"gcs_server", "raylet", "ray::"}
# that a process of Ray may take to open its ports
SECONDS = 20.0


def family() -> set[psutil.Process]:
    """Return this process and all that came of it."""
    me = psutil.Process()
    return {me, *me.children(recursive=True)}


def listening(others: set[psutil.Process]) -> dict[str, set[str]]:
    """Return name -> addresses that it listens on, of the processes of this one's tree.

    Args:
        others: left out; scenes of other tests may run in the background.
    """
    found: dict[str, set[str]] = {}
    for process in family() - others:
        try:
            name = process.name()
            sockets = process.net_connections(kind="inet")
        except psutil.NoSuchProcess:
            continue
        addresses = {one.laddr.ip for one in sockets if one.status == psutil.CONN_LISTEN}
        found.setdefault(name, set()).update(addresses)
    return found


def is_loopback(text: str) -> bool:
    """Return whether an address is one of loopback, also an IPv4 one as gRPC's sockets have it."""
    address = ipaddress.ip_address(text)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


@pytest.fixture(scope="module")
def addresses() -> Iterator[dict[str, set[str]]]:
    """The addresses that the processes of a local cluster with a worker listen on."""
    others = family() - {psutil.Process()}
    with cluster(None):
        assert ray.get(ray.remote(num_cpus=1)(lambda: 1).remote()) == 1
        deadline = time.monotonic() + SECONDS
        # the agent of the dashboard opens its ports last
        while len(listening(others)) < len(PROCESSES) + 2 and time.monotonic() < deadline:
            time.sleep(0.5)
        time.sleep(3.0)
        yield listening(others)


def test_every_process_of_a_local_cluster_listens_on_loopback_alone(
    addresses: dict[str, set[str]],
) -> None:
    open_to_all = {
        name: outside
        for name, ips in addresses.items()
        if (outside := {ip for ip in ips if not is_loopback(ip)})
    }
    assert open_to_all == {}


def test_what_listens_was_looked_at(addresses: dict[str, set[str]]) -> None:
    for process in PROCESSES:
        assert any(ips for name, ips in addresses.items() if name.startswith(process)), addresses
