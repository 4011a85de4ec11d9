"""The MLflow UI over an output folder, on this machine alone."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from raygkd.errors import ConfigError, ResourceError

HOST = "127.0.0.1"


def serve(output: Path, port: int) -> None:
    """Become the MLflow server of an output folder (the process is replaced).

    Args:
        output: folder that holds mlflow.db.
        port: TCP port on 127.0.0.1.

    Raises:
        ConfigError: the folder holds no store.
        ResourceError: the port is taken.
    """
    store = output.expanduser().resolve() / "mlflow.db"
    if not store.is_file():
        raise ConfigError(
            f"--output {output}: holds no mlflow.db; give the --output of an earlier run, or start "
            "one: raygkd tune --dataset digits --trials 8"
        )
    check_port(port)
    print(f"MLflow UI on http://{HOST}:{port} (Ctrl-C ends it)", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{store}", "--workers", "1"]
    command += ["--default-artifact-root", (store.parent / "mlartifacts").as_uri()]
    os.execve(sys.executable, command, {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"})


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
