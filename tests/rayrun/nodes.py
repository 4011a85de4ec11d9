"""Nodes of a Ray cluster on this machine, each in a network of its own where that is allowed."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ray  # noqa: F401  (brings psutil along)
from commands import FOREIGN
from servers import free_port, listens, wait_for

import psutil  # type: ignore[import-untyped]  # isort: skip

PORT, DASHBOARD = 6379, 8265
# of the networks that are kept for tests of devices, and are nowhere in use
NETWORK = "198.18"
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Network:
    """What nodes can be on.

    Attributes:
        outside: address that hosts have this machine under.
        hosts: one for each node that there may be at a time.
    """

    outside: str
    hosts: list[Host]


@dataclass(frozen=True)
class Host:
    """Where a node is.

    Attributes:
        address: its own, or that of the loopback.
        command: what a command line begins with that runs there.
    """

    address: str
    command: tuple[str, ...] = ()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)


@contextlib.contextmanager
def network(hosts: int) -> Iterator[Network]:
    """Yield hosts with a bridge between them and this machine; all on the loopback without root."""
    with contextlib.ExitStack() as stack:
        try:
            found = _namespaces(hosts, stack)
        except (OSError, subprocess.CalledProcessError):
            stack.close()
            found = Network(LOOPBACK, [Host(LOOPBACK)] * hosts)
        yield found


def _namespaces(hosts: int, stack: contextlib.ExitStack) -> Network:
    bridge = f"raygkd-{secrets.token_hex(3)}"
    net = f"{NETWORK}.{secrets.randbelow(256)}"
    _ip("link", "add", bridge, "type", "bridge")
    stack.callback(_ip, "link", "delete", bridge)
    outside = f"{net}.254"
    _ip("address", "add", f"{outside}/24", "dev", bridge)
    _ip("link", "set", bridge, "up")
    found = []
    for node in range(1, hosts + 1):
        name = f"{bridge}-{node}"
        _ip("netns", "add", name)
        stack.callback(_ip, "netns", "delete", name)
        cable = f"rg{name[-8:]}"
        _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", cable, "master", bridge, "up")
        _ip("-n", name, "address", "add", f"{net}.{node}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            _ip("-n", name, "link", "set", device, "up")
        found.append(Host(f"{net}.{node}", ("ip", "netns", "exec", name)))
    return Network(outside, found)


class Node:
    """``ray start`` with one CPU and one GPU, in a process group of its own.

    The GPU is one in Ray's books alone: where torch finds none, what is placed on it uses the CPU.

    Args:
        host: where it is.
        folder: gets Ray's files; a short path, since there are sockets in it.
        environment: of its processes, beside this one's.
        arguments: of ``ray start``.
        command: what stands before it.
    """

    def __init__(
        self,
        host: Host,
        folder: Path,
        environment: Mapping[str, str],
        *arguments: str,
        command: tuple[str, ...] = (),
    ):
        self.host, self.folder = host, folder
        self._log = folder / "log"
        ray_start = (str(Path(sys.executable).with_name("ray")), "start", "--block")
        # several nodes on the loopback must not have one agent's port
        ports = ("--dashboard-agent-listen-port", str(free_port())) if not host.command else ()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [
                    *(*host.command, *command, *ray_start, "--num-cpus", "1", *ports),
                    *("--num-gpus", "1"),
                    *("--node-ip-address", host.address, "--temp-dir", str(folder), *arguments),
                ],
                stdout=log,
                stderr=log,
                env=environment_of(environment),
                start_new_session=True,
            )

    def wait(self) -> None:
        """Wait until it is part of the cluster."""
        wait_for(lambda: "Ray runtime started" in self.log or self._process.poll() is not None)
        assert self._process.poll() is None, self.log

    @property
    def log(self) -> str:
        """What it wrote."""
        return self._log.read_text()

    def processes(self, *words: str) -> list[psutil.Process]:
        """Return its processes whose command lines begin with some words, the last one in part."""
        return [process for process, title in self._titles() if title.startswith(" ".join(words))]

    def titles(self, title: str) -> list[str]:
        """Return the command lines of its processes that begin so."""
        return [found for _, found in self._titles() if found.startswith(title)]

    def _titles(self) -> Iterator[tuple[psutil.Process, str]]:
        for process in psutil.Process(self._process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                yield process, " ".join(process.cmdline())

    def kill(self) -> None:
        """Kill all of it at once, as a machine does that loses its power."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._process.pid)
            for process in [root, *root.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
        self._process.wait(30)


def environment_of(added: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment for another one, without clusters and servers in it."""
    environment = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    # a job runs the python that it finds
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    return environment | dict(added)


class Nodes:
    """A cluster that asks for a token: a head, and nodes that come and go.

    Args:
        network: where they are.
        folder: returns a new folder of a name.
        environment: of all processes, beside this one's.
        stack: ends them.

    Attributes:
        all: the nodes there are, the head first.
        dashboard: the URL that jobs are sent to.
        client: what the environment of a client needs.
    """

    def __init__(
        self,
        network: Network,
        folder: Callable[[str], Path],
        environment: Mapping[str, str],
        stack: contextlib.ExitStack,
    ):
        self._hosts, self._folder, self._stack = list(network.hosts), folder, stack
        token = folder("token") / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self._let_in = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self._environment = {**environment, **self._let_in}
        head = self._hosts[0]
        port, dashboard = (PORT, DASHBOARD) if head.command else (free_port(), free_port())
        self._address = f"{head.address}:{port}"
        self.dashboard = f"http://{head.address}:{dashboard}"
        self.client = {**self._let_in, "RAY_API_SERVER_ADDRESS": self.dashboard}
        self.token = token.read_text()
        self.all: list[Node] = []
        self._start(
            *("--head", "--port", str(port), "--dashboard-port", str(dashboard)),
            *("--dashboard-host", head.address),
        )
        # a node says that it has started before its dashboard listens
        wait_for(lambda: listens(head.address, dashboard))

    def add(self, command: tuple[str, ...] = ()) -> Node:
        """Start a node on a free host.

        Args:
            command: what its command line begins with.
        """
        return self._start("--address", self._address, command=command)

    def _start(self, *arguments: str, command: tuple[str, ...] = ()) -> Node:
        host = self._hosts.pop(0)
        folder = self._folder("n")
        node = Node(host, folder, self._environment, *arguments, command=command)
        self._stack.callback(node.kill)
        node.wait()
        self.all.append(node)
        return node

    def lose(self, node: Node) -> None:
        """Kill a node; its host is free again."""
        node.kill()
        self.all.remove(node)
        self._hosts.append(node.host)
