from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raygkd.data import epoch_windows, evaluation_rows, steps_per_epoch
from raygkd.data.plan import shuffled
from raygkd.errors import ConfigError

ROWS = np.arange(1000)
UNITS = np.arange(0, 1000, 50)


def plan(rows=ROWS, units=UNITS, **changes):
    options = {
        "seed": 0,
        "epoch": 0,
        "rank": 0,
        "world_size": 1,
        "batch_size": 16,
        "window_rows": 200,
    }
    return epoch_windows(rows, units, **{**options, **changes})


def order(**changes):
    return np.concatenate(plan(**changes)).tolist()


def test_order_is_equal_for_equal_seeds_and_differs_otherwise():
    assert order() == order()
    assert order() != order(epoch=1)
    assert order() != order(seed=1)


def test_plan_is_the_same_on_every_machine():
    # the numbers are what this call printed; a change of them changes every run's data order
    windows = plan(
        np.arange(12), np.arange(0, 12, 3), seed=1, epoch=2, rank=1, world_size=2, batch_size=2,
        window_rows=4,
    )  # fmt: skip
    assert [window.tolist() for window in windows] == [[7, 8, 10, 6], [11, 9]]


def test_dropped_rows_differ_from_epoch_to_epoch():
    dropped = [set(ROWS.tolist()) - set(order(epoch=epoch, batch_size=48)) for epoch in (0, 1)]
    assert len(dropped[0]) == len(dropped[1]) == 1000 % 48
    assert dropped[0] != dropped[1]


def test_window_reads_few_units():
    for window in plan(window_rows=100):
        assert len(set(window // 50)) <= 3


def test_rows_of_large_units_are_mixed_between_windows():
    first = plan(units=np.array([0]), window_rows=100)[0]
    assert first.max() - first.min() > 500


def test_neighbours_in_a_batch_change_between_epochs():
    batches = [{frozenset(order(epoch=epoch)[:16])} for epoch in range(3)]
    assert len(set.union(*batches)) == 3


def test_too_few_rows_for_a_step_name_the_numbers():
    assert steps_per_epoch(1000, 2, 16) == 31
    with pytest.raises(ConfigError, match=r"30 training images.*2 x 16.*--batch-size"):
        steps_per_epoch(30, 2, 16)


def test_sample_comes_from_few_units():
    assert len(set(shuffled(ROWS, UNITS, seed=0)[:100] // 50)) == 2


@given(data=st.data())
def test_ranks_train_on_equal_disjoint_parts_in_bounded_windows(data):
    total = data.draw(st.integers(8, 400))
    rows = np.flatnonzero(np.random.default_rng(total).random(total) < 0.8)
    world_size = data.draw(st.integers(1, 4))
    batch_size = data.draw(st.integers(1, 8))
    window_rows = data.draw(st.integers(1, 100))
    unit_rows = data.draw(st.integers(1, 100))
    options = {
        "units": np.arange(0, total, unit_rows),
        "world_size": world_size,
        "batch_size": batch_size,
        "window_rows": window_rows,
        "seed": data.draw(st.integers(0, 2**40)),
        "epoch": data.draw(st.integers(0, 300)),
    }
    if len(rows) < world_size * batch_size:
        with pytest.raises(ConfigError):
            plan(rows, **options)
        return
    windows = [plan(rows, rank=rank, **options) for rank in range(world_size)]
    assert all(0 < len(window) <= window_rows for part in windows for window in part)
    parts = [np.concatenate(part).tolist() for part in windows]
    steps = steps_per_epoch(len(rows), world_size, batch_size)
    assert {len(part) for part in parts} == {steps * batch_size}
    together = [row for part in parts for row in part]
    assert len(set(together)) == len(together)
    assert set(together) <= set(rows.tolist())


@given(rows=st.integers(0, 50), world_size=st.integers(1, 7))
def test_evaluation_scores_every_row_exactly_once(rows, world_size):
    parts = [evaluation_rows(np.arange(rows), rank, world_size) for rank in range(world_size)]
    assert np.concatenate(parts).tolist() == list(range(rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
