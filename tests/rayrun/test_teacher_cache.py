"""What the teacher says, in the object store: equal trials, its bound, and what its loss costs."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import RayError
from ray.tune import with_parameters
from records import without_times
from torch import Tensor

from raygkd.assembly.models import untrained_file
from raygkd.config import Config, with_settings
from raygkd.data.run_images import Images
from raygkd.data.views import UNCHANGED, Views
from raygkd.rayrun import references
from raygkd.rayrun.cluster import Resources
from raygkd.rayrun.image_stream import SharedImages, share
from raygkd.rayrun.stop_signal import StopFolder
from raygkd.rayrun.teacher_cache import CachedTeacher, Key, start_cache
from raygkd.rayrun.trainables import WarmTrial
from raygkd.rayrun.tune_search import numbers
from raygkd.rayrun.worker import Job, make_job

MIB = 1 << 20
MakeJob = Callable[..., Job]
CONFIG = with_settings(Config(), {"teacher": "resnet8", "student": "resnet8", "epochs": 2})
# trials of one search, as different as they come
TRIALS: tuple[dict[str, Any], ...] = (
    {"lr": 0.05, "levels": [3], "temperature": 0.3, "dim": 4},
    {"lr": 0.03, "levels": [1, 2, 3], "temperature": 1.0, "dim": 8, "centre": True},
)


@pytest.fixture(scope="module")
def shared(digits: Images, nodes: list[Resources]) -> SharedImages:
    """The digits in the object store."""
    return share(digits, cache_mb=64)


@pytest.fixture(scope="module")
def repeated(digits: Images, nodes: list[Resources]) -> SharedImages:
    """The same without random changes."""
    return share(replace(digits, augment="none"), cache_mb=64)


@pytest.fixture
def job_of(tmp_path: Path) -> MakeJob:
    """Return a function that makes the job of a search in a folder of its own."""
    numbers = itertools.count()

    def make(images: SharedImages, **settings: Any) -> Job:
        return make_job(
            with_settings(CONFIG, settings),
            images,
            untrained_file("resnet8", images.spec),
            folder=tmp_path / str(next(numbers)),
            stop=StopFolder(tmp_path / "stop"),
        )

    return make


@contextmanager
def trial_of(job: Job, params: Mapping[str, Any]) -> Iterator[WarmTrial]:
    number = len(list(job.folder.glob("trials/*")))
    trial = with_parameters(WarmTrial, job=job)({"trial": number, "params": dict(params)})
    try:
        yield trial
    finally:
        trial.stop()


def epochs_of(trial: WarmTrial, count: int = 2) -> list[dict[str, float]]:
    return [without_times(numbers(trial.train())) for _ in range(count)]


def shares_of(epochs: list[dict[str, float]]) -> list[float]:
    """Return the shares of the cache, and take them out of the metrics."""
    return [metrics.pop("teacher_cached") for metrics in epochs]


def parts_of(rows: Tensor) -> dict[str, Tensor]:
    """Return 1,000 values and a half-precision one for each row."""
    values = rows[:, None].double() + torch.arange(1000) / 1000
    return {"map 1": values, "logits": rows[:, None].bfloat16()}


def stored(cache: CachedTeacher, epoch: int, rows: Tensor) -> bool:
    """Return whether rows are there, as they were given."""
    wanted = parts_of(rows)
    found = cache.get(epoch, rows, wanted)
    assert all(
        torch.equal(found[name], wanted[name]) and found[name].dtype == wanted[name].dtype
        for name in found
    )
    return found.keys() == wanted.keys()


def is_lost(reference: ray.ObjectRef) -> bool:
    """Wait until an object of an actor that was killed is gone."""
    end = time.monotonic() + 60.0
    while time.monotonic() < end:
        try:
            ray.get(reference, timeout=10.0)
        except RayError:
            return True
        time.sleep(0.1)
    return False


def test_trials_with_the_cache_equal_those_without_bit_for_bit(
    shared: SharedImages, job_of: MakeJob
) -> None:
    jobs = job_of(shared), job_of(shared, teacher_cache_mb=64)
    assert jobs[0].teacher_cache is None
    shares = []
    for params in TRIALS:
        with trial_of(jobs[0], params) as plain, trial_of(jobs[1], params) as cached:
            expected, found = epochs_of(plain), epochs_of(cached)
        shares.append(shares_of(found))
        assert found == expected
    assert shares == [[0.0, 0.0], [1.0, 1.0]]


def test_trials_of_other_teachers_sizes_and_augmentations_share_nothing_wrong(
    shared: SharedImages, job_of: MakeJob
) -> None:
    other = untrained_file("resnet14", shared.spec, seed=1)
    plain, cached = job_of(shared), job_of(shared, teacher_cache_mb=64)
    jobs = [replace(job, teachers={"resnet14": references.put(other)}) for job in (plain, cached)]
    shares = []
    for params in (
        {"image_size": 8, "teacher": "resnet8"},
        # the same images for the same teacher
        {"image_size": 4, "teacher": "resnet8"},
        {"image_size": 8, "teacher": "resnet14"},
        {"image_size": 8, "teacher": "resnet8", "augment": "crop-flip"},
        {"image_size": 8, "teacher": "resnet8", "augment": "none"},
    ):
        params = {"method": "kd", **params}
        with trial_of(jobs[0], params) as expected, trial_of(jobs[1], params) as found:
            metrics = epochs_of(found, 1)
            shares += shares_of(metrics)
            assert metrics == epochs_of(expected, 1), params
    assert shares == [0.0, 1.0, 0.0, 0.0, 0.0]


def test_a_trial_of_a_larger_size_is_the_run_of_that_size(
    shared: SharedImages, job_of: MakeJob
) -> None:
    """What the images are prepared for is the largest size of a search."""
    job = job_of(shared, image_size=8)
    with trial_of(job, {"image_size": 8}) as searched, trial_of(job, {}) as alone:
        assert epochs_of(searched, 1) == epochs_of(alone, 1)


def test_images_that_never_change_come_from_the_cache_in_the_second_epoch(
    repeated: SharedImages, job_of: MakeJob
) -> None:
    # a batch is half of the images: the second epoch has them in other batches
    params = {"batch_size": 150, **TRIALS[1]}
    jobs = job_of(repeated), job_of(repeated, teacher_cache_mb=64)
    with trial_of(jobs[0], params) as plain, trial_of(jobs[1], params) as cached:
        expected, found = epochs_of(plain), epochs_of(cached)
    assert shares_of(found) == [0.0, 1.0]
    assert found[0] == expected[0]
    # a row of another batch may be rounded in another way
    for name, value in expected[1].items():
        assert found[1][name] == pytest.approx(value, rel=1e-3), name


def test_a_job_without_a_teacher_to_learn_from_has_no_cache(
    shared: SharedImages, job_of: MakeJob
) -> None:
    assert job_of(shared, teacher_cache_mb=64, method="none").teacher_cache is None


def test_entries_are_taken_until_one_does_not_fit_and_then_no_more(
    nodes: list[Resources],
) -> None:
    one = 8 * (8000 + 8 + 2 + 8)
    cache = start_cache(3 * one + one // 2, None)
    writer = cache.open(seed=0, repeats=False)
    batches = torch.arange(64).view(8, 8)
    for rows in batches:
        writer.add(0, rows, parts_of(rows))
    # it would fit
    cache.open(seed=0, repeats=False).add(1, batches[0, :2], parts_of(batches[0, :2]))
    reader = cache.open(seed=0, repeats=False)
    assert [stored(reader, 0, rows) for rows in batches] == [True] * 3 + [False] * 5
    assert not stored(reader, 1, batches[0, :2])
    assert ray.get(cache.keeper.held.remote()) == 3 * one


def test_rows_are_found_in_any_order_and_kept_once(nodes: list[Resources]) -> None:
    cache = start_cache(MIB, None)
    for _ in range(2):
        writer = cache.open(seed=0, repeats=False)
        for rows in torch.arange(32).view(4, 8):
            writer.add(5, rows, parts_of(rows))
    assert ray.get(cache.keeper.held.remote()) == 32 * (8000 + 8 + 2 + 8)
    reader = cache.open(seed=0, repeats=False)
    mixed = torch.randperm(32, generator=torch.Generator().manual_seed(0))[:8]
    assert stored(reader, 5, mixed)
    assert not stored(reader, 5, torch.arange(28, 36))
    # other epochs, other seeds, other changes and batches of another size are others
    assert not stored(reader, 6, mixed)
    assert not stored(cache.open(seed=1, repeats=False), 5, mixed)
    assert not stored(cache.open(seed=0, repeats=False, views=Views(erase=0.5)), 5, mixed)
    assert not stored(cache.open(seed=0, repeats=False), 5, torch.arange(4))


def test_a_trial_whose_cache_is_lost_goes_on_with_equal_results(
    shared: SharedImages, job_of: MakeJob
) -> None:
    jobs = job_of(shared), job_of(shared, teacher_cache_mb=64)
    assert jobs[1].teacher_cache is not None
    with trial_of(jobs[1], TRIALS[0]) as first:
        epochs_of(first)
    with trial_of(jobs[0], TRIALS[1]) as plain, trial_of(jobs[1], TRIALS[1]) as cached:
        found = epochs_of(cached, 1)
        ray.kill(jobs[1].teacher_cache.keeper)
        found += epochs_of(cached, 1)
        assert shares_of(found) == [1.0, 0.0]
        assert found == epochs_of(plain)


def test_entries_that_are_lost_are_a_warning(
    nodes: list[Resources], caplog: pytest.LogCaptureFixture
) -> None:
    cache = start_cache(MIB, None)
    rows = torch.arange(16).view(2, 8)
    writer = cache.open(seed=0, repeats=False)
    for batch in rows:
        writer.add(0, batch, parts_of(batch))
    reader = cache.open(seed=0, repeats=False)
    assert stored(reader, 0, rows[0])
    entries, _ = ray.get(cache.keeper.directory.remote(Key("", "", 0, 0, UNCHANGED, 8)))
    ray.kill(cache.keeper)
    assert is_lost(entries[1].parts)
    with caplog.at_level(logging.WARNING):
        assert not stored(reader, 0, rows[1])
        reader.add(0, rows[1], parts_of(rows[1]))
        assert not stored(reader, 1, rows[1])
    assert [record.message.partition(";")[0] for record in caplog.records] == [
        "the teacher cache is lost"
    ]
