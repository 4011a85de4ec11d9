"""For all tests: raygkd's settings of Ray hold wherever a test imports ray first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from servers import ObjectStore

import raygkd.rayrun  # noqa: F401
from raygkd.storage.atomic_files import Place, place
from raygkd.storage.object_store import client

# what is played in the background takes its share of the processors
settings.register_profile("beside scenes", deadline=None)
settings.load_profile("beside scenes")

# folder of tests -> what they cost, where a file does not say otherwise
COSTS = {
    "core": "unit",
    "data": "unit",
    "models": "unit",
    "report": "unit",
    "tracking": "e2e",
    "cli": "e2e",
    "rayrun": "ray",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test by what it costs, so that ``pytest -m unit`` runs the quick ones."""
    for item in items:
        if not any(item.get_closest_marker(cost) for cost in COSTS.values()):
            item.add_marker(COSTS[item.path.parent.name])


@pytest.fixture(scope="session", autouse=True)
def scenes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mapping[str, Future[Any]]]:
    """Name of a scene of tests/rayrun -> its outcome; they are played while other tests run."""
    files = {item.path.stem for item in request.session.items if item.path.parent.name == "rayrun"}
    if not files:
        yield {}
        return
    from playing import playing

    with playing(files, tmp_path_factory.mktemp) as outcomes:
        yield outcomes


@pytest.fixture(scope="session")
def started_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    store = ObjectStore(tmp_path_factory.mktemp("objects"))
    store.start()
    try:
        store.wait()
        yield store
    finally:
        store.kill()


@pytest.fixture
def object_store(
    started_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ObjectStore]:
    """An S3 server that this process uses; a test writes below a prefix of its own."""
    for name, value in started_store.environment.items():
        monkeypatch.setenv(name, value)
    client.cache_clear()
    yield started_store
    client.cache_clear()


@pytest.fixture(params=["local", "remote"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A folder in which nothing is: on this machine, and in an object store."""
    if request.param == "local":
        return tmp_path / "run"
    return place(f"{request.getfixturevalue('object_store').url}/{tmp_path.name}")
