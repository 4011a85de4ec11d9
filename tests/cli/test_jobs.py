"""What is submitted to a cluster, and the cluster's own files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
JOBS = sorted((ROOT / "jobs").glob("*.py"))
CLUSTERS = sorted((ROOT / "cluster").glob("*.yaml"))


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
    assert [job.stem for job in JOBS] == ["teacher", "train", "tune"]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_a_job_has_the_options_of_its_command_and_no_others(job: Path) -> None:
    assert help_of(str(job)) == help_of("-m", "raygkd", job.stem)


def test_there_is_a_cluster() -> None:
    assert CLUSTERS


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_cluster_file_is_one_that_ray_takes(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load(path.read_text())))
