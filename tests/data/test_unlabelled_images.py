"""Images without labels: how they are found, split, and mixed with labelled ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raygkd.config import DataConfig
from raygkd.data import open_source
from raygkd.data.inspect import sample_sheet, table_info
from raygkd.data.parquet import open_table
from raygkd.data.plan import Mix, rows_of_table
from raygkd.data.prepare import prepare
from raygkd.data.recognition import recognise
from raygkd.data.run_images import Images, open_images
from raygkd.data.source_info import source_info
from raygkd.data.splits import MOST_HELD_OUT, hold_out, split_rows
from raygkd.errors import ConfigError, DataError

UNITS = np.arange(0, 200, 20)


@pytest.fixture
def photos(tmp_path: Path, encode_image: Callable[..., bytes]) -> Path:
    """A folder of 12 images: beside folders, and two levels below."""
    root = tmp_path / "photos"
    (root / "a" / "b").mkdir(parents=True)
    (root / "train").mkdir()
    for number in range(12):
        folder = (root, root / "a" / "b", root / "train")[number % 3]
        (folder / f"{number}.png").write_bytes(encode_image(number))
    (root / "a" / "notes.txt").write_text("no image")
    return root


def write_labelled(path: Path, encode_image: Callable[..., bytes], labels: list[Any]) -> Path:
    """Write images with labels, None for none, as a foreign Parquet file."""
    images = [encode_image(100 + number) for number in range(len(labels))]
    table = pa.table({"image": images, "label": pa.array(labels, pa.int32())})
    pq.write_table(table, path, row_group_size=4)
    return path


def opened(tmp_path: Path, **data: Any) -> Images:
    return open_images(DataConfig(**data), seed=0, output=tmp_path / "output")


def test_a_folder_gives_every_image_below_it(photos: Path) -> None:
    source = open_source("unlabelled", photos)
    assert {Path(sample.origin).stem for sample in source.samples} == set(map(str, range(12)))
    assert {(sample.label, sample.split) for sample in source.samples} == {(-1, "train")}
    assert source.class_names == ()
    notes = photos / "a" / "notes.txt"
    assert source.warnings == (f"skipped 1 file with the suffix .txt, first in {notes}",)
    assert source_info(source, str(photos))["unlabelled"] == 12
    assert recognise(str(photos / "a" / "b"), allow_unlabelled=True) == (
        "unlabelled",
        "only images",
    )
    with pytest.raises(DataError, match="looks unlabelled; train without labels with --unlabell"):
        recognise(str(photos / "a" / "b"))


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no images in '.*' \(known suffixes: jpg"):
        open_source("unlabelled", tmp_path)


def test_shards_of_images_without_labels(photos: Path, tmp_path: Path) -> None:
    shards, sheet = tmp_path / "shards", tmp_path / "sheet.png"
    summary = prepare(open_source("unlabelled", photos), str(shards))
    assert (summary["images"], summary["classes"]) == (12, 0)
    table = open_table(str(shards))
    assert table.class_names == ()
    assert table.labels.tolist() == [-1] * 12
    info = table_info(table)
    assert (info["classes"], info["unlabelled"], info["images"]) == ({}, 12, 12)
    sample_sheet(table, str(sheet))
    assert sheet.stat().st_size > 0


@pytest.mark.parametrize("column", ["missing", "null", "int"])
def test_parquet_without_labels(
    tmp_path: Path, encode_image: Callable[..., bytes], column: str
) -> None:
    columns: dict[str, Any] = {"image": [encode_image(number) for number in range(8)]}
    if column != "missing":
        columns["label"] = pa.array([None] * 8, pa.null() if column == "null" else pa.int32())
    path = tmp_path / "images.parquet"
    pq.write_table(pa.table(columns), path)
    images = opened(tmp_path, dataset="unlabelled", data_dir=str(path), val_fraction=0.5)
    assert {split: len(rows) for split, rows in images.rows.items()} == {
        "train": 0, "val": 4, "test": 0, "unlabelled": 4,
    }  # fmt: skip
    assert (images.spec.unlabelled, images.spec.has_labels) == (4, False)
    with pytest.raises(DataError, match=r"has no labels; add a column label .* --unlabelled "):
        opened(tmp_path, dataset="parquet", data_dir=str(path))


def test_rows_without_a_label_are_counted_apart(
    tmp_path: Path, encode_image: Callable[..., bytes]
) -> None:
    labels = [0, 1, None, 0, 1, -1, 0, 1, None, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1]
    path = write_labelled(tmp_path / "images.parquet", encode_image, labels)
    images = opened(tmp_path, dataset="parquet", data_dir=str(path))
    assert images.rows["unlabelled"].tolist() == [2, 5, 8]
    labelled = np.concatenate([images.rows[split] for split in ("train", "val", "test")])
    assert sorted(labelled) == [row for row in range(21) if row not in (2, 5, 8)]
    assert (images.spec.unlabelled, images.spec.has_labels) == (3, True)
    assert images.spec.class_counts == (7, 7)


def test_a_second_set_follows_the_labelled_rows(
    photos: Path, tmp_path: Path, encode_image: Callable[..., bytes]
) -> None:
    path = write_labelled(tmp_path / "images.parquet", encode_image, [0, 1] * 10)
    alone = opened(tmp_path, dataset="parquet", data_dir=str(path))
    assert "unlabelled" not in alone.rows
    images = opened(tmp_path, dataset="parquet", data_dir=str(path), unlabelled=str(photos))
    table, rows = images.table, images.rows["unlabelled"]
    assert rows.tolist() == list(range(20, 32))
    for split in ("train", "val", "test"):
        assert images.rows[split].tolist() == alone.rows[split].tolist()
    assert set(table.read(rows)) == {encode_image(number) for number in range(12)}
    assert table.read(np.array([31, 3]))[1] == encode_image(103)
    assert "part-00000.parquet row 2 (" in table.where(22)
    assert "images.parquet row 7" in table.where(7)
    assert images.identity != alone.identity


def test_labelled_images_determine_the_size_of_the_input(tmp_path: Path, photos: Path) -> None:
    """Images of another size beside them must not change the student's input."""
    images = opened(tmp_path, dataset="digits", unlabelled=str(photos), limit_train=20)
    assert images.spec.image_size == (8, 8)


def test_held_out_images_are_bounded_and_the_same_for_a_seed() -> None:
    splits = np.zeros(50_000, np.uint8)
    given: dict[str, Any] = {"val_fraction": 0.1, "limit_train": None}
    found = hold_out(splits, seed=1, **given)
    assert (len(found.val), len(found.unlabelled)) == (MOST_HELD_OUT, 50_000 - MOST_HELD_OUT)
    assert not np.intersect1d(found.val, found.unlabelled).size
    assert np.array_equal(found.val, hold_out(splits, seed=1, **given).val)
    assert not np.array_equal(found.val, hold_out(splits, seed=2, **given).val)
    # a validation split of the data is used
    splits[:10] = 1
    assert hold_out(splits, seed=1, **given).val.tolist() == list(range(10))
    assert len(hold_out(splits, seed=1, **given | {"limit_train": 7}).unlabelled) == 7
    with pytest.raises(DataError, match="20 images without labels are too few: 2 for validation"):
        hold_out(np.zeros(20, np.uint8), seed=1, **given)


def test_labels_of_no_class_leave_the_splits_of_the_others_alone() -> None:
    labels = np.arange(60) % 3
    given: dict[str, Any] = {
        "val_fraction": 0.2, "test_fraction": 0.2, "limit_train": None, "seed": 0,
    }  # fmt: skip
    splits = np.zeros(60, np.uint8)
    alone = split_rows(labels, splits, **given)
    more = split_rows(np.append(labels, [-1] * 9), np.append(splits, [0] * 6 + [1, 2, 2]), **given)
    assert more.unlabelled.tolist() == list(range(60, 66))
    for split in ("train", "val", "test"):
        assert np.array_equal(getattr(alone, split), getattr(more, split))


# The batches


def mix(labelled: int = 50, unlabelled: int = 150, **changes: Any) -> Mix:
    given = {
        "labelled": np.arange(labelled),
        "unlabelled": np.arange(labelled, labelled + unlabelled),
        "share": 0.5,
        "num_rows": 200,
    }
    return Mix(**{**given, **changes})


def batches(one: Mix, *, rank: int = 0, world_size: int = 1, epoch: int = 0) -> np.ndarray:
    """Return the rows (steps, 8) that a rank trains on."""
    windows = one.windows(
        UNITS, seed=0, epoch=epoch, rank=rank, world_size=world_size, batch_size=8, window_rows=20
    )
    assert max(map(len, windows)) <= 20
    return np.concatenate(windows).reshape(-1, 8)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("labelled", "unlabelled"), [(50, 150), (150, 50), (3, 150)])
def test_every_batch_has_its_share_and_an_epoch_all_images_of_the_larger_set(
    world_size: int, labelled: int, unlabelled: int
) -> None:
    one = mix(labelled, unlabelled)
    of_ranks = [batches(one, rank=rank, world_size=world_size) for rank in range(world_size)]
    larger = max(labelled, unlabelled)
    steps = larger // (4 * world_size)
    assert one.steps_per_epoch(world_size, 8) == steps
    for rows in of_ranks:
        assert rows.shape == (steps, 8)
        assert ((rows_of_table(rows, 200) < labelled).sum(1) == 4).all()
    every = np.concatenate(of_ranks).ravel()
    # no row twice: one that is read again has another number
    assert len(np.unique(every)) == len(every)
    counts = np.bincount(rows_of_table(every, 200), minlength=labelled + unlabelled)
    of_larger = counts[:labelled] if labelled > unlabelled else counts[labelled:]
    of_smaller = counts[labelled:] if labelled > unlabelled else counts[:labelled]
    assert of_larger.max() == 1
    assert of_larger.sum() == 4 * world_size * steps
    # as often as it takes, each time in another order
    assert of_smaller.max() - of_smaller.min() <= 1
    assert of_smaller.sum() == of_larger.sum()


def test_orders_differ_between_epochs_and_repeat_for_the_same_one() -> None:
    assert np.array_equal(batches(mix()), batches(mix()))
    assert not np.array_equal(batches(mix()), batches(mix(), epoch=1))


def test_a_student_alone_has_as_many_steps_with_labels_alone() -> None:
    rows = batches(mix(skips_unlabelled=True))
    assert len(rows) == len(batches(mix()))
    assert (rows_of_table(rows, 200) < 50).all()
    # without labelled images in the steps
    rows = batches(mix(share=1.0))
    assert rows.shape == (18, 8)
    assert (rows_of_table(rows, 200) >= 50).all()


def test_a_share_of_no_image_and_too_few_images_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--unlabelled-share 0\.01: is 0 of the 8 images of a"):
        mix(share=0.01).steps_per_epoch(1, 8)
    with pytest.raises(ConfigError, match=r"--unlabelled-share 0\.99: is 8 of the 8 images of a"):
        mix(share=0.99).steps_per_epoch(1, 8)
    with pytest.raises(ConfigError, match="6 training images are too few for one step of 1 x 8"):
        mix(3, 3).steps_per_epoch(1, 8)
