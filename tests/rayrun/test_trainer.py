"""A training in this process is that of a worker, and goes on after failures and Ctrl-C."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from records import journal, without_times

from raygkd.assembly.models import untrained_file
from raygkd.config import ClusterConfig, Config, with_settings
from raygkd.data.run_images import Images
from raygkd.engine import read_checkpoint
from raygkd.rayrun.cluster import Resources
from raygkd.rayrun.image_stream import share
from raygkd.rayrun.step_progress import Steps, TellSteps
from raygkd.rayrun.stop_signal import StopFolder
from raygkd.rayrun.trainer import OnEpoch, train
from raygkd.rayrun.worker import CHECKPOINT, Job, make_job
from raygkd.storage.atomic_files import Place
from raygkd.workflows.interrupts import Interrupts

CONFIG = with_settings(Config(), {"teacher": "resnet8", "student": "resnet8", "epochs": 2})
ALONE = ClusterConfig()
MakeJob = Callable[..., Job]


@pytest.fixture
def job_of(digits: Images, tmp_path: Path) -> MakeJob:
    """Return a function that makes the job of a training in a folder."""

    def make(name: str) -> Job:
        return make_job(
            CONFIG,
            share(digits, cache_mb=64),
            untrained_file("resnet8", digits.spec),
            folder=tmp_path / name,
            stop=StopFolder(tmp_path / "stop"),
        )

    return make


def ignore(told: Any) -> None:
    """Ignore an epoch, a step or a line."""


def trained(job: Job, on_epoch: OnEpoch = ignore, on_step: TellSteps = ignore) -> Place:
    return train(job, ALONE, cpus=1, on_epoch=on_epoch, on_step=on_step)


def assert_same(one: Place, other: Place) -> None:
    """Compare the students of two checkpoints, and the journals beside them."""
    students = [read_checkpoint(path)["student"] for path in (one, other)]
    torch.testing.assert_close(*students, rtol=0, atol=0)
    assert journal(Path(str(one.parent))) == journal(Path(str(other.parent)))


def test_a_training_here_is_that_of_a_worker(job_of: MakeJob, nodes: list[Resources]) -> None:
    from raygkd.rayrun.torch_trainer import train_by_workers

    told: dict[str, list[dict[str, float]]] = {"here": [], "worker": []}
    steps: dict[str, list[Steps]] = {"here": [], "worker": []}
    here, by_worker = job_of("here"), job_of("worker")
    trained(here, told["here"].append, steps["here"].append)
    by_worker.folder.mkdir()
    train_by_workers(
        by_worker,
        ALONE,
        cpus=1,
        on_epoch=told["worker"].append,
        on_step=steps["worker"].append,
    )
    assert_same(here.folder / CHECKPOINT, by_worker.folder / CHECKPOINT)
    one, other = ([without_times(metrics) for metrics in told[way]] for way in told)
    assert one == other
    assert len(one) == 2
    for way in steps:
        assert steps[way]
        assert all(0 < one.share <= 1 and one.images_per_second > 0 for one in steps[way]), way
    assert not list(by_worker.folder.glob("steps*"))


@pytest.mark.unit
def test_a_training_here_tells_its_first_step(job_of: MakeJob) -> None:
    told: list[Steps] = []
    trained(job_of("told"), on_step=told.append)
    first = told[0]
    assert first.epoch == 1
    # the digits of the fixture are split into batches of this size
    assert first.share == pytest.approx(1 / (300 // CONFIG.optim.batch_size))
    # nearly all of two epochs is left
    seconds = CONFIG.optim.batch_size / first.images_per_second
    assert first.seconds_left == pytest.approx(seconds * (2 / first.share - 1))
    assert str(Steps(2, 0.25, 1234.5, 75.2)) == "epoch 2: 25%, 1,234 images/s, 1:15 left"


@pytest.mark.unit
def test_a_training_here_goes_on_after_a_failure(
    job_of: MakeJob, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[float] = []

    def fails_once(metrics: Mapping[str, Any]) -> None:
        told.append(metrics["epoch"])
        if told == [1]:
            raise OSError("no answer")

    failed = trained(job_of("failed"), fails_once)
    assert told == [1, 1, 2]
    assert "failed (restart 1 of at most 3); it resumes after epoch 0: OSError" in caplog.text
    assert_same(failed, trained(job_of("undisturbed")))


@pytest.mark.unit
def test_a_training_here_fails_after_its_restarts(job_of: MakeJob) -> None:
    tries: list[float] = []

    def fails(metrics: Mapping[str, Any]) -> None:
        tries.append(metrics["epoch"])
        raise OSError("no answer")

    with pytest.raises(OSError, match="no answer"):
        train(
            job_of("failed"), ClusterConfig(max_failures=2), cpus=1, on_epoch=fails, on_step=ignore
        )
    assert tries == [1, 1, 1]


@pytest.mark.unit
def test_a_training_here_finishes_its_step_on_ctrl_c_and_is_resumed(job_of: MakeJob) -> None:
    job = job_of("interrupted")
    interrupts = Interrupts(job.stop, ignore)

    def interrupt(metrics: Mapping[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    waiting = interrupts.waiting_for(lambda: [job.folder.name])
    with pytest.raises(KeyboardInterrupt), interrupts.handled(), waiting:
        trained(job, interrupt)
    [part] = read_checkpoint(job.folder / CHECKPOINT)["parts"]
    assert part["steps"] > 0
    told: list[float] = []
    resumed = trained(job, lambda metrics: told.append(metrics["epoch"]))
    assert told == [1, 2]
    assert_same(resumed, trained(job_of("undisturbed")))
