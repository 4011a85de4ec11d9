"""A real Ray cluster of this machine, small real images in it, and the command line beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import pytest
import torch
from commands import Command
from filling import fill
from hanging import hang
from killing import kill
from mlflow import MlflowClient
from scenes import Scene, Scenes, undisturbed
from untrained import untrained_file

from raygkd import tracking
from raygkd.build import ImageSpec
from raygkd.config import DataConfig
from raygkd.inputs import Images, open_images
from raygkd.models import save_model_file
from raygkd.rayrun.cluster import Resources, cluster

torch.set_num_threads(1)
# scene -> the files whose tests look at its outcome; the longest first
SCENES = {
    kill: {"test_survival"},
    fill: {"test_storage"},
    hang: {"test_server"},
    undisturbed: {"test_survival", "test_storage"},
}


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
    path = tmp_path_factory.mktemp("teacher") / "model.pt"
    spec = ImageSpec(
        class_names=tuple("0123456789"), image_size=(8, 8), mean=(0.3,) * 3, std=(0.4,) * 3
    )
    save_model_file(path, untrained_file("resnet14", spec))
    return path


@contextlib.contextmanager
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Command]]:
    """Yield a function that starts a command; end them all."""
    started: list[Command] = []

    def start(*arguments: str | Path) -> Command:
        started.append(Command(tmp_path_factory.mktemp("command"), *arguments))
        return started[-1]

    try:
        yield start
    finally:
        for command in started:
            command.end()


@pytest.fixture(scope="module")
def raygkd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Command]]:
    """Return a function that starts a command; none outlives the module."""
    with commands(tmp_path_factory) as start:
        yield start


@pytest.fixture(scope="session")
def scenes(
    request: pytest.FixtureRequest,
    untrained_teacher: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Scenes]:
    """Name of a scene -> its outcome, of those that the files of this run of the tests need.

    Two at a time, since most of a scene is waiting.
    """
    files = {item.path.stem for item in request.session.items}
    wanted = [scene for scene, users in SCENES.items() if files & users]
    with ThreadPoolExecutor(2) as pool, contextlib.ExitStack() as stack:
        start = stack.enter_context(commands(tmp_path_factory))
        scene = Scene(start, untrained_teacher, tmp_path_factory.mktemp, stack)
        yield {play.__name__: pool.submit(play, scene) for play in wanted}


@pytest.fixture
def client(output: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowClient]:
    """The MLflow store of the output folder, which mlflow's own functions use too."""
    # mlflow puts both into the environment as well
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.setenv(name, tracking.default_uri(output))
    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    mlflow.set_tracking_uri(tracking.default_uri(output))
    mlflow.set_registry_uri(tracking.default_uri(output))
    yield MlflowClient()
    mlflow.set_tracking_uri(before[0])
    mlflow.set_registry_uri(before[1])
