"""A real Ray cluster of this machine, and small real images in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from raygkd.config import DataConfig
from raygkd.inputs import Images, open_images
from raygkd.rayrun.cluster import Resources, cluster


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
