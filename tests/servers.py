"""Real MLflow and S3 servers that can be killed and started again, and waiting for them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import boto3

# generous: another program may hold the cores
PATIENCE = 300.0
# nothing that a run leaves may hold it
SECRET = "planted-secret-of-the-store"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def listens(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=5):
            return True
    except OSError:
        return False


def wait_for(condition: Callable[[], object], patience: float = PATIENCE) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.05)


class Process:
    """A server on a port of its own, in a group of processes of its own; its folder has its log.

    Args:
        folder: of what it keeps.
        host: address that it listens on.
        environment: what its process has besides this one's.
    """

    health = "/"

    def __init__(
        self,
        folder: Path,
        host: str = "127.0.0.1",
        environment: Mapping[str, str] | None = None,
    ):
        self.folder, self.host = folder, host
        self.port = free_port()
        self.uri = f"http://{host}:{self.port}"
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        """Return what is run, after Python's own ``-m``."""
        raise NotImplementedError

    def start(self) -> None:
        """Start it; ``wait`` tells when it answers."""
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *self.command()],
                stdout=log,
                stderr=log,
                env=self._environment,
                process_group=0,
            )

    def wait(self) -> None:
        assert self._process is not None
        url = self.uri + self.health
        wait_for(lambda: answers(url) or self._process.poll() is not None)
        assert self._process.poll() is None, (self.folder / "server.log").read_text()

    def pause(self) -> None:
        """Let it hang: what is asked of it is accepted, and not answered."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it answer again, and first what it was asked meanwhile."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """Kill it with its children, as a crash would."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


class Server(Process):
    """`mlflow server` over a folder.

    Args:
        folder: of its store.
        host: address that it listens on.
        artifacts: where it keeps artifacts; in the folder where nothing is given.
        environment: what its process has besides this one's.
    """

    health = "/health"

    def __init__(
        self,
        folder: Path,
        host: str = "127.0.0.1",
        artifacts: str | None = None,
        environment: Mapping[str, str] | None = None,
    ):
        jobs = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        super().__init__(folder, host, {**jobs, **(environment or {})})
        self._artifacts = artifacts or str(folder / "artifacts")

    def command(self) -> list[str]:
        store = f"sqlite:///{self.folder}/mlflow.db"
        command = ["mlflow", "server", "--port", str(self.port), "--workers", "1"]
        command += ["--host", self.host, "--allowed-hosts", f"{self.host}:{self.port}"]
        command += ["--backend-store-uri", store, "--artifacts-destination", self._artifacts]
        return command


class Serving(Process):
    """`mlflow models serve` of one model.

    Args:
        folder: of its log.
        model: URI of the model.
        uri: of the MLflow server that has it.
    """

    health = "/ping"

    def __init__(self, folder: Path, model: str, uri: str):
        # it starts uvicorn by name
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        super().__init__(folder, environment={"MLFLOW_TRACKING_URI": uri, "PATH": path})
        self._model = model

    def command(self) -> list[str]:
        command = ["mlflow", "models", "serve", "--env-manager", "local", "--workers", "1"]
        return [*command, "--model-uri", self._model, "--port", str(self.port)]


class ObjectStore(Process):
    """An S3 server with one bucket, in memory."""

    bucket = "shared"

    def command(self) -> list[str]:
        return ["moto.server", "-H", "127.0.0.1", "-p", str(self.port)]

    @property
    def url(self) -> str:
        """The bucket."""
        return f"s3://{self.bucket}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process must have to use it, in AWS's usual variables."""
        return {
            "AWS_ENDPOINT_URL": self.uri,
            "AWS_ACCESS_KEY_ID": "test-key",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def wait(self) -> None:
        super().wait()
        self.client().create_bucket(Bucket=self.bucket)

    def client(self) -> Any:
        """Return boto3's client."""
        return boto3.client(
            "s3",
            endpoint_url=self.uri,
            aws_access_key_id="test-key",
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
        )

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """Return key -> content of all objects whose keys begin with a prefix."""
        client = self.client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        return {key: client.get_object(Bucket=self.bucket, Key=key)["Body"].read() for key in keys}
