"""`raygkd ui`: the runs of an output folder, on this machine alone, until it is told to end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import PATIENCE, answers, wait_for


def children(pid: int) -> set[int]:
    """Return the processes below one."""
    below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {int(child) for child in below}.union(*(children(int(child)) for child in below))


def is_there(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def listening(port: int) -> set[str]:
    """Return the addresses that something listens on at a port, as the kernel writes them."""
    tables = [Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6")]
    lines = [line.split() for table in tables for line in table.splitlines()]
    places = [line[1].split(":") for line in lines if line[3] == "0A"]
    return {address for address, hexadecimal in places if int(hexadecimal, 16) == port}


@pytest.fixture
def ui(
    store: Path, closed_port: int, tmp_path: Path
) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "raygkd", "ui", "--output", str(store)]
        processes.append(
            subprocess.Popen(
                [*command, "--port", str(closed_port)],
                stderr=subprocess.PIPE,
                text=True,
                cwd=tmp_path,
                start_new_session=True,
            )
        )
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            for pid in children(process.pid) | {process.pid}:
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def test_ui_shows_the_runs_here_alone_until_ctrl_c(
    ui: Callable[[], subprocess.Popen[str]], closed_port: int, tmp_path: Path
) -> None:
    process = ui()
    url = f"http://127.0.0.1:{closed_port}"
    wait_for(lambda: answers(f"{url}/health") or process.poll() is not None)
    assert listening(closed_port) == {f"{socket.htonl(0x7F000001):08X}"}
    for host in ("127.0.0.1", "localhost"):
        request = urllib.request.Request(
            f"http://{host}:{closed_port}/api/2.0/mlflow/experiments/search",
            data=b'{"max_results": 100}',
            headers={"Content-Type": "application/json", "Origin": f"http://{host}:{closed_port}"},
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            names = {experiment["name"] for experiment in json.load(answer)["experiments"]}
        assert "first" in names
        assert answers(f"http://{host}:{closed_port}/")
    all_of_it = children(process.pid)
    assert all_of_it

    # Ctrl-C reaches the whole group of the terminal
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert err.startswith(f"MLflow UI on {url} (Ctrl-C ends it)\n")
    assert "Traceback" not in err
    assert "INFO" not in err
    assert [pid for pid in all_of_it if is_there(pid)] == []
    assert list(tmp_path.iterdir()) == []


def test_ui_ends_on_sigterm_while_it_starts(
    ui: Callable[[], subprocess.Popen[str]],
) -> None:
    process = ui()
    wait_for(lambda: children(process.pid) or process.poll() is not None)
    all_of_it = children(process.pid)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert "Traceback" not in err
    assert [pid for pid in all_of_it if is_there(pid)] == []
