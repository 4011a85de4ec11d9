"""A real Ray cluster of this machine, small real images in it, and the command line beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
import torch
from commands import Command, commands_in
from mlflow import MlflowClient
from playing import playing, untrained_teacher_in
from scenes import Scenes

from raygkd.config import DataConfig
from raygkd.data.run_images import Images, open_images
from raygkd.rayrun.cluster import Resources, cluster
from raygkd.tracking.store import default_uri

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def scenes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scenes]:
    """Name of a scene -> its outcome, for the tests of this session."""
    files = {item.path.stem for item in request.session.items}
    with playing(files, tmp_path_factory.mktemp) as outcomes:
        yield outcomes


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Resources]]:
    """A local cluster that is stopped after the module, also when a test fails."""
    with cluster(None) as found:
        yield found


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Images:
    """The handwritten digits, prepared once."""
    output = tmp_path_factory.mktemp("digits")
    return open_images(DataConfig(limit_train=300), seed=0, output=output)


@pytest.fixture(scope="session")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of all commands: one MLflow store, and the digits prepared once."""
    return tmp_path_factory.mktemp("output")


@pytest.fixture(scope="session")
def untrained_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file of random weights: what a search scores besides the student, trained or not."""
    return untrained_teacher_in(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def raygkd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Command]]:
    """Return a function that starts a command; none outlives the module."""
    with commands_in(tmp_path_factory.mktemp) as start:
        yield start


@pytest.fixture
def client(output: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowClient]:
    """The MLflow store of the output folder, which mlflow's own functions use too."""
    # mlflow puts both into the environment as well
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.setenv(name, default_uri(output))
    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    mlflow.set_tracking_uri(default_uri(output))
    mlflow.set_registry_uri(default_uri(output))
    yield MlflowClient()
    mlflow.set_tracking_uri(before[0])
    mlflow.set_registry_uri(before[1])
