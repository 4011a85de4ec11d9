from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raygkd.data import PlainStream, Splits, build_transform, rebatch, split_rows
from raygkd.errors import ConfigError, DataError

TRAIN = build_transform("crop-flip", 12, train=True)
EVAL = build_transform("none", 12, train=False)


def stream_of(table, **changes):
    splits = split_rows(
        table.labels, table.splits, val_fraction=0.2, test_fraction=0.2, limit_train=None, seed=0
    )
    options = {"batch_size": 7, "seed": 0, "window_rows": 20}
    return PlainStream(table, splits, TRAIN, EVAL, **{**options, **changes})


def rows_of(batches):
    return [row for batch in batches for row in batch["row"].tolist()]


@given(
    sizes=st.lists(st.integers(0, 12), max_size=8),
    batch_size=st.integers(1, 10),
    drop_last=st.booleans(),
)
def test_rebatching_keeps_every_row_in_order(sizes, batch_size, drop_last):
    numbers = np.arange(sum(sizes))
    pieces = np.split(numbers, np.cumsum(sizes)[:-1]) if sizes else []
    windows = [{"row": piece, "image": piece[:, None] * 2} for piece in pieces]
    batches = list(rebatch(windows, batch_size, drop_last=drop_last))
    kept = len(numbers) - len(numbers) % batch_size if drop_last else len(numbers)
    assert [row for batch in batches for row in batch["row"]] == list(range(kept))
    assert all(len(batch["row"]) == batch_size for batch in batches[:-1])
    assert all((batch["image"][:, 0] == batch["row"] * 2).all() for batch in batches)
    assert not (drop_last and any(len(batch["row"]) != batch_size for batch in batches))


def test_rebatching_takes_one_window_at_a_time():
    taken = []

    def windows():
        for number in range(100):
            taken.append(number)
            yield {"row": np.arange(10)}

    next(rebatch(windows(), 15, drop_last=True))
    assert taken == [0, 1]


def test_epoch_has_the_promised_steps_of_full_batches(make_table):
    stream = stream_of(make_table(100))
    batches = list(stream.train_batches(0))
    assert len(batches) == stream.steps_per_epoch == 60 // 7
    for batch in batches:
        assert batch["image"].shape == (7, 3, 12, 12)
        assert batch["image"].dtype == torch.uint8
        assert batch["label"].dtype == batch["row"].dtype == torch.int64
        assert (batch["label"].numpy() == stream.table.labels[batch["row"]]).all()
    assert set(rows_of(batches)) <= set(stream.splits.train.tolist())


def test_epochs_differ_and_repeat_for_equal_seeds(make_table):
    table = make_table(100)
    first, again = (list(stream_of(table).train_batches(3)) for _ in range(2))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(first, again, strict=True))
    assert rows_of(stream_of(table).train_batches(4)) != rows_of(first)


def test_window_size_changes_the_order_but_no_image(make_table):
    table = make_table(100)
    images = [
        {
            int(row): image
            for b in stream.train_batches(0)
            for row, image in zip(b["row"], b["image"])
        }
        for stream in (stream_of(table, window_rows=size) for size in (8, 1000))
    ]
    assert images[0].keys() == images[1].keys()
    assert all(torch.equal(image, images[1][row]) for row, image in images[0].items())


def test_ranks_share_training_and_evaluation(make_table):
    table = make_table(100)
    streams = [stream_of(table, rank=rank, world_size=3, batch_size=4) for rank in range(3)]
    trained = [rows_of(stream.train_batches(0)) for stream in streams]
    assert {len(rows) for rows in trained} == {20}
    assert len(set().union(*trained)) == 60
    scored = [row for stream in streams for row in rows_of(stream.eval_batches("val"))]
    assert scored == streams[0].splits.val.tolist()


def test_empty_share_has_no_batches(make_table):
    stream = stream_of(make_table(100))
    stream.splits = Splits(stream.splits.train, stream.splits.val, np.empty(0, np.int64))
    assert list(stream.eval_batches("test")) == []


def test_batches_can_be_changed_in_place(make_table):
    batch = next(stream_of(make_table(60)).eval_batches("val"))
    batch["label"] += 1
    batch["row"] += 1
    batch["image"] += 1


def test_too_few_rows_are_refused_at_once(make_table):
    with pytest.raises(ConfigError, match="18 training images"):
        stream_of(make_table(30), batch_size=19)


def test_broken_images_are_counted_once_each(broken_table):
    table = broken_table(60, (3, 30, 50), splits=["train"] * 40 + ["val"] * 20)
    parts = Splits(table.rows("train"), table.rows("val"), table.rows("test"))
    stream = PlainStream(table, parts, TRAIN, EVAL, batch_size=8, seed=0, skip_bad=True)
    for epoch in range(2):
        assert len(list(stream.train_batches(epoch))) == 5
        assert stream.bad_images == 2
    assert rows_of(stream.eval_batches("val")) == [*range(40, 50), *range(51, 60)]
    assert stream.bad_images == 3


def test_broken_image_stops_an_epoch_with_its_row(broken_table):
    with pytest.raises(DataError, match=r"broken\.parquet row 3: not a complete image"):
        list(stream_of(broken_table(60, (3,))).train_batches(0))
