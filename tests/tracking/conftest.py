"""A server and a store for all tests of a session; a tracker and an experiment for each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from servers import Server, free_port

from raygkd.tracking.store import connect, default_uri
from raygkd.tracking.tracker import Tracker

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def starting_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session", autouse=True)
def started_while_other_tests_run(starting_server: Server) -> None:
    """The server takes seconds to start."""


@pytest.fixture
def server(starting_server: Server) -> Server:
    starting_server.wait()
    return starting_server


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with a store, which takes seconds to make; its name is no password."""
    output = tmp_path_factory.mktemp("me@work")
    connect(default_uri(output), "first", output)
    return output


@pytest.fixture
def uri(store: Path) -> str:
    return default_uri(store)


@pytest.fixture
def client(uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@pytest.fixture
def closed_port() -> int:
    return free_port()


_number = itertools.count()


@pytest.fixture
def experiment(uri: str, store: Path) -> str:
    """An experiment of the test's own in the SQLite store."""
    return connect(uri, f"experiment {next(_number)}", store)


@pytest.fixture
def tracker(uri: str, experiment: str, tmp_path: Path) -> Iterator[Tracker]:
    tracker = Tracker(uri, experiment, tmp_path / "journal.jsonl")
    yield tracker
    tracker.close()
