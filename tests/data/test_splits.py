from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raygkd.data import split_rows
from raygkd.errors import ConfigError, DataError

LABELS = np.repeat(np.arange(4), [100, 60, 30, 10])
NO_SPLITS = np.zeros(len(LABELS), dtype=np.uint8)


def cut(labels=LABELS, splits=NO_SPLITS, **changes):
    options = {"val_fraction": 0.1, "test_fraction": 0.2, "limit_train": None, "seed": 0}
    return split_rows(labels, splits, **{**options, **changes})


def test_missing_splits_are_cut_stratified_and_disjoint():
    splits = cut()
    assert np.bincount(LABELS[splits.val]).tolist() == [10, 6, 3, 1]
    assert np.bincount(LABELS[splits.test]).tolist() == [20, 12, 6, 2]
    together = np.concatenate([splits.train, splits.val, splits.test])
    assert np.sort(together).tolist() == list(range(len(LABELS)))
    assert (np.diff(splits.train) > 0).all()


def test_cut_is_a_function_of_the_seed():
    assert cut(seed=3).val.tolist() == cut(seed=3).val.tolist()
    assert cut(seed=3).val.tolist() != cut(seed=4).val.tolist()


def test_test_rows_do_not_depend_on_the_other_settings():
    test = cut().test.tolist()
    assert cut(val_fraction=0.3).test.tolist() == test
    assert cut(limit_train=20).test.tolist() == test
    assert cut(limit_train=20).val.tolist() == cut().val.tolist()


def test_given_splits_are_kept():
    given_splits = NO_SPLITS.copy()
    given_splits[::10] = 1
    given_splits[1::10] = 2
    splits = cut(splits=given_splits, val_fraction=0.0, test_fraction=0.5)
    assert splits.val.tolist() == list(range(0, 200, 10))
    assert splits.test.tolist() == list(range(1, 200, 10))
    assert len(splits.train) == 160


def test_only_the_missing_split_is_cut():
    given_splits = np.where(np.arange(200) % 5 == 0, 2, 0).astype(np.uint8)
    splits = cut(splits=given_splits)
    assert splits.test.tolist() == list(range(0, 200, 5))
    assert len(splits.val) == 16


def test_limit_keeps_shares_and_is_exact():
    assert np.bincount(LABELS[cut(limit_train=40).train]).tolist() == [20, 12, 6, 2]
    assert np.bincount(LABELS[cut(limit_train=4).train]).tolist() == [1, 1, 1, 1]
    assert len(cut(limit_train=10_000).train) == len(cut().train)


def test_zero_test_fraction_leaves_the_test_empty():
    assert len(cut(test_fraction=0.0).test) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_fraction": 0.0}, "--val-fraction 0: must be above 0"),
        ({"val_fraction": 1.0}, "--val-fraction 1.0: must be at least 0 and below 1"),
        ({"test_fraction": -0.1}, "--test-fraction -0.1"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "leave nothing to train on"),
        ({"limit_train": 3}, "--limit-train 3: must be at least 4"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        cut(**changes)


def test_too_few_images_for_validation_are_refused():
    with pytest.raises(DataError, match="no image is left for validation: 3 training images"):
        cut(np.arange(3), np.zeros(3, np.uint8), val_fraction=0.4, test_fraction=0.0)


def test_class_without_training_rows_is_named():
    labels, given_splits = np.array([0, 0, 0, 1, 1]), np.array([0, 0, 0, 1, 2])
    with pytest.raises(DataError, match="class 1 has 2 images, but none for training; add some"):
        cut(labels, given_splits)


def test_only_image_of_a_class_stays_in_training():
    labels = np.array([0] * 9 + [1])
    splits = cut(labels, np.zeros(10, np.uint8), val_fraction=0.4, test_fraction=0.4)
    assert 9 in splits.train
    assert (len(splits.train), len(splits.val), len(splits.test)) == (2, 4, 4)


@given(
    sizes=st.lists(st.integers(4, 30), min_size=5, max_size=8),
    val_fraction=st.floats(0.05, 0.45),
    test_fraction=st.floats(0.0, 0.45),
    seed=st.integers(0, 2**40),
)
def test_any_cut_is_disjoint_complete_and_trains_every_class(
    sizes, val_fraction, test_fraction, seed
):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    splits = cut(
        labels,
        np.zeros(len(labels), np.uint8),
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        seed=seed,
    )
    together = np.concatenate([splits.train, splits.val, splits.test])
    assert np.sort(together).tolist() == list(range(len(labels)))
    assert set(labels[splits.train]) == set(range(len(sizes)))
    assert len(splits.val) == round(val_fraction * len(labels))
