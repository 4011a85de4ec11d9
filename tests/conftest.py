"""For all tests: raygkd's settings of Ray hold wherever a test imports ray first."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from servers import ObjectStore
from watched import FILES
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

import raygkd.rayrun  # noqa: F401
from raygkd.storage.atomic_files import Place, place
from raygkd.storage.object_store import client

# other processes take their share of the processors
settings.register_profile("beside others", deadline=None)
settings.load_profile("beside others")

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
# until the scenes of tests/rayrun are over
SCENE_SECONDS = 2400


def pytest_configure() -> None:
    """Let several processes share the processors: one thread each, and none behind the others."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("RAY_worker_niceness", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test by what it costs; several processes begin with what takes longest."""
    for item in items:
        if not any(item.get_closest_marker(cost) for cost in COSTS.values()):
            item.add_marker(COSTS[item.path.parent.name])
        if item.path.stem in FILES:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(SCENE_SECONDS))
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: (item.path.stem not in FILES, COSTS[item.path.parent.name]))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling:
    """Return what hands out the tests."""
    return _Scheduling(config, log)


class _Scheduling(LoadFileScheduling):
    """The tests of a file run in one process, and so do all that look at scenes."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "scenes" if Path(file).stem in FILES else file


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
