"""The blocks of the guides that need no network, run as they stand there."""

from __future__ import annotations

from pathlib import Path

import pytest
from shown_blocks import pages_run_by, run_block, run_by

NAME = "tests/cli/test_guides.py"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the quickstart was followed up to its search."""
    folder = tmp_path_factory.mktemp("workplace")
    for step in run_by("tests/cli/test_quickstart.py", "docs/quickstart.md"):
        run_block(step, folder)
        if step.code.startswith("raygkd tune"):
            return folder
    raise AssertionError("the quickstart has no search")


@pytest.mark.parametrize("page", pages_run_by(NAME))
def test_the_blocks_of_a_guide_run(page: str, workplace: Path) -> None:
    for block in run_by(NAME, page):
        run_block(block, workplace)
