from __future__ import annotations

import numpy as np
import pytest
import torch

from raygkd.data import (
    build_transform,
    channel_statistics,
    decode,
    decode_rows,
    load_window,
    open_source,
    transform_window,
)
from raygkd.data.parquet import open_table
from raygkd.data.prepare import prepare
from raygkd.errors import DataError

TRAIN = build_transform("crop-flip", 12, train=True)
EVAL = build_transform("none", 12, train=False)


def load(table, rows, transform=TRAIN, *, epoch=0, skip_bad=False, exact=True):
    return load_window(
        table, np.asarray(rows), transform, seed=0, epoch=epoch, skip_bad=skip_bad, exact=exact
    )


def test_window_holds_images_labels_and_rows_in_the_order_asked(make_table):
    table = make_table(40)
    rows = [30, 2, 17]
    window = load(table, rows, EVAL)
    arrays = window.arrays
    assert {name: array.dtype for name, array in arrays.items()} == {
        "image": np.uint8,
        "label": np.int64,
        "row": np.int64,
    }
    assert arrays["row"].tolist() == rows
    assert arrays["label"].tolist() == table.labels[rows].tolist()
    for place, row in enumerate(rows):
        expected_CHW = decode(table.read(np.array([row]))[0]).numpy()
        assert (arrays["image"][place] == expected_CHW).all()
    assert len(window.bad_rows) == 0


def test_row_looks_the_same_in_every_window(make_table):
    table = make_table(40)
    together = load(table, [5, 6, 7]).arrays["image"]
    assert (load(table, [7, 6]).arrays["image"] == together[[2, 1]]).all()
    assert (load(table, [5, 6, 7], epoch=1).arrays["image"] != together).any()


@pytest.mark.parametrize("exact", [True, False])
def test_cached_images_give_what_reading_gives(broken_table, exact):
    table = broken_table(10, (4,))
    cache = list(decode_rows(table, np.arange(10), skip_bad=True))
    rows = np.array([9, 4, 1, 0])
    cached = transform_window(
        [cache[row] for row in rows], rows, table.labels[rows], TRAIN, seed=0, epoch=3, exact=exact
    )
    read = load(table, rows, epoch=3, skip_bad=True, exact=exact)
    assert all((cached.arrays[name] == read.arrays[name]).all() for name in read.arrays)
    assert cached.bad_rows.tolist() == read.bad_rows.tolist() == [4]


def test_broken_image_stops_with_file_and_row(broken_table):
    table = broken_table(10, (6,))
    with pytest.raises(DataError, match=r"broken\.parquet row 6: not a complete image.*--skip-bad"):
        load(table, [1, 6, 2])


def test_broken_images_are_replaced_by_the_next_good_one(broken_table):
    table = broken_table(10, (0, 1, 9))
    window = load(table, [3, 0, 1, 5, 9], skip_bad=True, exact=True)
    assert window.arrays["row"].tolist() == [3, 5, 5, 5, 3]
    assert window.arrays["label"].tolist() == table.labels[[3, 5, 5, 5, 3]].tolist()
    assert (window.arrays["image"] == load(table, [3, 5, 5, 5, 3]).arrays["image"]).all()
    assert window.bad_rows.tolist() == [0, 1, 9]


def test_broken_images_are_left_out_of_evaluation(broken_table):
    table = broken_table(10, (0, 9))
    window = load(table, [3, 0, 1, 9], EVAL, skip_bad=True, exact=False)
    assert window.arrays["row"].tolist() == [3, 1]
    assert (window.arrays["image"] == load(table, [3, 1], EVAL).arrays["image"]).all()
    assert window.bad_rows.tolist() == [0, 9]


def test_window_of_broken_images_cannot_train(broken_table):
    table = broken_table(10, (0, 1))
    with pytest.raises(DataError, match="all 2 images of a window are unreadable"):
        load(table, [1, 0], skip_bad=True, exact=True)
    assert len(load(table, [1, 0], skip_bad=True, exact=False).arrays["row"]) == 0


def test_loading_leaves_the_torch_generator_alone(make_table):
    before = torch.get_rng_state()
    load(make_table(6), range(6))
    assert torch.equal(torch.get_rng_state(), before)


def test_channel_statistics_are_those_of_all_pixels(make_table):
    table = make_table(60)
    images_NCHW = np.stack([decode(image).numpy() for image in table.read(np.arange(60))]) / 255
    mean, std = channel_statistics(table, np.arange(60), EVAL)
    assert mean == pytest.approx(images_NCHW.mean(axis=(0, 2, 3)), rel=1e-12)
    assert std == pytest.approx(images_NCHW.std(axis=(0, 2, 3)), rel=1e-12)


def test_channel_statistics_sample_is_bounded_and_repeatable(make_table):
    table = make_table(60)
    sampled = channel_statistics(table, np.arange(60), EVAL, limit=10)
    assert sampled == channel_statistics(table, np.arange(60), EVAL, limit=10)
    assert sampled != channel_statistics(table, np.arange(60), EVAL)


def test_channel_statistics_skip_or_name_broken_images(broken_table):
    table = broken_table(10, (2,))
    good = np.delete(np.arange(10), 2)
    skipped = channel_statistics(table, np.arange(10), EVAL, skip_bad=True)
    assert skipped == channel_statistics(table, good, EVAL)
    with pytest.raises(DataError, match="row 2: not a complete image"):
        channel_statistics(table, np.arange(10), EVAL)
    with pytest.raises(DataError, match="none of 1 sampled images"):
        channel_statistics(table, np.array([2]), EVAL, skip_bad=True)


def test_constant_channel_has_a_floored_std(tmp_path):
    prepare(open_source("digits"), str(tmp_path / "digits"))
    table = open_table(str(tmp_path / "digits"))
    # the first column of a digit is black nearly everywhere
    dark = [row for row in range(50) if decode(table.read(np.array([row]))[0])[:, 0, 0].max() == 0]
    corner = build_transform("none", 1, train=False)
    _, std = channel_statistics(table, np.array(dark[:1]), corner)
    assert std == (0.001, 0.001, 0.001)
