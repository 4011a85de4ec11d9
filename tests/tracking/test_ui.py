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
from servers import PATIENCE, answers, wait_for


def fields(pid: str) -> list[str]:
    """Return what the kernel tells of a process: state, parent, group, session and so on."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ["Z", "0", "0", "0"]


def session(pid: int) -> set[int]:
    """Return the processes of a session that are not over."""
    numbers = [path.name for path in Path("/proc").iterdir() if path.name.isdigit()]
    return {
        int(number)
        for number in numbers
        if fields(number)[3] == str(pid) and fields(number)[0] != "Z"
    }


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
        with process:
            for pid in session(process.pid):
                os.kill(pid, signal.SIGKILL)


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
    assert len(session(process.pid)) > 1

    # Ctrl-C reaches the whole group of the terminal
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(PATIENCE) == 0
    # what is killed takes a moment to be gone
    wait_for(lambda: not session(process.pid), patience=10.0)
    err = process.communicate()[1]
    assert err.startswith(f"MLflow UI on {url} (Ctrl-C ends it)\n")
    assert "Traceback" not in err
    assert "INFO" not in err
    assert list(tmp_path.iterdir()) == []


def test_ui_ends_on_sigterm_while_it_starts(
    ui: Callable[[], subprocess.Popen[str]],
) -> None:
    process = ui()
    wait_for(lambda: len(session(process.pid)) > 1 or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
    # what is killed takes a moment to be gone
    wait_for(lambda: not session(process.pid), patience=10.0)
    assert "Traceback" not in process.communicate()[1]
