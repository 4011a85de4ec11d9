"""For all tests: raygkd's settings of Ray hold wherever a test imports ray first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import settings

import raygkd.rayrun  # noqa: F401

# what is played in the background takes its share of the processors
settings.register_profile("beside scenes", deadline=None)
settings.load_profile("beside scenes")


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
