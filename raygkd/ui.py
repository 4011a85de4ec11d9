"""The MLflow UI over an output folder, on this machine alone."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from raygkd.errors import ConfigError, ResourceError, RunFailed

HOST = "127.0.0.1"
# seconds that the server has to end requests that are under way
_GRACE = 5.0


def serve(output: Path, port: int) -> None:
    """Run the MLflow server of an output folder until Ctrl-C or SIGTERM.

    Args:
        output: folder that holds mlflow.db.
        port: TCP port on 127.0.0.1.

    Raises:
        ConfigError: the folder holds no store.
        ResourceError: the port is taken.
        RunFailed: the server ended by itself.
    """
    store = output.expanduser().resolve() / "mlflow.db"
    if not store.is_file():
        raise ConfigError(
            f"--output {output}: holds no mlflow.db; give the --output of an earlier run, or start "
            "one: raygkd tune --dataset digits --trials 8"
        )
    check_port(port)
    print(f"MLflow UI on http://{HOST}:{port} (Ctrl-C ends it)", file=sys.stderr, flush=True)
    # an exception out of a handler could come between the server's start and its name here
    told: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: told.append(number))
    # MLflow's command starts processes of its own and passes signals on to them; in a group apart
    # from the terminal's they get Ctrl-C once, from here, and none is left over
    server = subprocess.Popen(_command(store, port), env=_environment(), process_group=0)
    while server.poll() is None and not told:
        time.sleep(0.1)
    if told:
        _signal_group(server, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(_GRACE)
    _signal_group(server, signal.SIGKILL)
    code = server.wait()
    if not told:
        raise RunFailed(f"MLflow's server ended with exit code {code}; what it wrote is above")


def _command(store: Path, port: int) -> list[str]:
    uri = f"sqlite:///{store}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port)]
    command += ["--backend-store-uri", uri, "--registry-store-uri", uri, "--workers", "1"]
    command += ["--default-artifact-root", (store.parent / "mlartifacts").as_uri()]
    # a line for each request is of no use here
    return [*command, "--uvicorn-opts", "--log-level warning"]


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # eight more processes, for scoring of language models
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        # deprecations between MLflow and its web framework
        "PYTHONWARNINGS": "ignore",
    }


def _signal_group(leader: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader.pid, number)


def check_port(port: int) -> None:
    """Refuse a port that something listens on already.

    Raises:
        ResourceError: it is taken; names it and the way out.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ResourceError(
                f"--port {port}: cannot be used on {HOST} ({error.strerror}); give another, such "
                f"as --port {port + 1}"
            ) from error
