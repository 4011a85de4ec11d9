"""What is submitted to a cluster."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JOBS = sorted((ROOT / "jobs").glob("*.py"))


def help_of(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command, "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "COLUMNS": "100"},
    )
    return done.stdout


def test_there_is_a_job_for_each_command_that_trains() -> None:
    assert [job.stem for job in JOBS] == ["compare", "evaluate", "teacher", "train", "tune"]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_a_job_has_the_options_of_its_command_and_no_others(job: Path) -> None:
    assert help_of(str(job)) == help_of("-m", "raygkd", job.stem)
