"""The Ray streams give what the plan says: the plain torch stream's batches, to the bit."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raygkd.config import DataConfig
from raygkd.data.loader import PlainStream
from raygkd.data.prepare import prepare
from raygkd.data.run_images import Images, open_images
from raygkd.data.sources import open_source
from raygkd.data.splits import Splits
from raygkd.errors import DataError
from raygkd.rayrun.image_stream import RayStream, share
from raygkd.rayrun.torch_trainer import known_cause

pytestmark = pytest.mark.usefixtures("nodes")
STREAMED, IN_MEMORY = 0, 1024
BATCH = 32


def ray_stream(images: Images, cache_mb: int, rank: int = 0, world_size: int = 1) -> RayStream:
    return RayStream(
        share(images, cache_mb),
        batch_size=BATCH,
        seed=3,
        epochs=range(2),
        rank=rank,
        world_size=world_size,
    )


def plain_stream(images: Images, rank: int = 0, world_size: int = 1) -> PlainStream:
    return PlainStream(
        images.table,
        Splits(**images.rows),
        images.transform("train"),
        images.transform("val"),
        batch_size=BATCH,
        seed=3,
        rank=rank,
        world_size=world_size,
        window_rows=images.window_rows,
        skip_bad=images.skip_bad,
    )


def assert_equal_batches(left: list, right: list) -> None:
    assert len(left) == len(right) > 0
    for one, other in zip(left, right, strict=True):
        for name in ("image", "label", "row"):
            assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("cache_mb", [STREAMED, IN_MEMORY])
@pytest.mark.parametrize("rank", [0, 1])
def test_batches_of_every_epoch_equal_the_plain_stream(
    digits: Images, cache_mb: int, rank: int
) -> None:
    # several windows to an epoch, so that their order counts
    images = dataclasses.replace(digits, window_rows=50)
    stream, plain = ray_stream(images, cache_mb, rank, 2), plain_stream(images, rank, 2)
    for epoch in range(2):
        assert_equal_batches(list(stream.train_batches(epoch)), list(plain.train_batches(epoch)))
        assert_equal_batches(list(stream.eval_batches("val")), list(plain.eval_batches("val")))
    assert_equal_batches(list(stream.eval_batches("test")), list(plain.eval_batches("test")))
    stream.close()


def test_a_run_has_one_execution_for_all_its_epochs(digits: Images) -> None:
    stream = ray_stream(digits, STREAMED)
    list(stream.train_batches(0))
    ahead = stream._ahead
    list(stream.eval_batches("val"))
    list(stream.train_batches(1))
    assert stream._ahead is ahead
    stream.close()


def test_a_resumed_run_streams_the_epoch_it_is_at(digits: Images) -> None:
    shared = share(digits, STREAMED)
    resumed = RayStream(shared, batch_size=BATCH, seed=3, epochs=range(1, 2), rank=0, world_size=1)
    assert_equal_batches(
        list(resumed.train_batches(1)), list(plain_stream(digits).train_batches(1))
    )
    resumed.close()


@pytest.fixture(scope="module")
def with_broken(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Shards of 120 small photographs-to-be, three of them cut off in the middle."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    images = []
    for number in range(120):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(file, "PNG")
        images.append(file.getvalue()[: 40 if number in (7, 50, 90) else None])
    path = tmp_path_factory.mktemp("broken") / "images.parquet"
    splits = ["train"] * 80 + ["val"] * 20 + ["test"] * 20
    labels = [number % 2 for number in range(120)]
    pq.write_table(
        pa.table({"image": images, "label": labels, "split": splits}), path, row_group_size=20
    )
    return DataConfig(dataset="parquet", data_dir=str(path))


@pytest.mark.parametrize("cache_mb", [STREAMED, IN_MEMORY])
def test_broken_images_are_skipped_and_counted(
    with_broken: DataConfig, cache_mb: int, tmp_path: Path
) -> None:
    data = dataclasses.replace(with_broken, skip_bad=True)
    images = open_images(data, seed=0, output=tmp_path)
    stream = RayStream(
        share(images, cache_mb), batch_size=20, seed=0, epochs=range(1), rank=0, world_size=1
    )
    train = torch.cat([batch["row"] for batch in stream.train_batches(0)])
    assert len(train) == 80
    assert not {7, 50} & set(train.tolist())
    assert stream.bad_images == 2
    val = torch.cat([batch["row"] for batch in stream.eval_batches("val")])
    assert sorted(val.tolist()) == [row for row in range(80, 100) if row != 90]
    assert stream.bad_images == 3
    stream.close()


def test_a_broken_image_stops_the_stream_with_its_path_and_row(
    with_broken: DataConfig, tmp_path: Path
) -> None:
    sampled = open_images(dataclasses.replace(with_broken, skip_bad=True), seed=0, output=tmp_path)
    images = dataclasses.replace(sampled, skip_bad=False)
    with pytest.raises(Exception, match=r"row (7|50|90)") as decoded:
        share(images, IN_MEMORY)
    assert isinstance(known_cause(decoded.value), DataError)
    stream = RayStream(
        share(images, STREAMED), batch_size=20, seed=0, epochs=range(1), rank=0, world_size=1
    )
    with pytest.raises(Exception, match=r"images\.parquet row (7|50|90)") as streamed:
        list(stream.train_batches(0))
    assert isinstance(known_cause(streamed.value), DataError)
    stream.close()


@pytest.mark.parametrize("world_size", [1, 2])
def test_images_with_and_without_labels_are_the_same_in_both_modes(
    tmp_path: Path, world_size: int
) -> None:
    shards = tmp_path / "shards"
    prepare(open_source("digits"), str(shards))
    data = DataConfig(limit_train=100, unlabelled=str(shards))
    images = open_images(data, seed=0, output=tmp_path)

    def passes(cache_mb: int, rank: int) -> list[list[dict[str, torch.Tensor]]]:
        with contextlib.closing(
            RayStream(
                share(images, cache_mb),
                batch_size=BATCH // world_size,
                seed=3,
                epochs=range(2),
                rank=rank,
                world_size=world_size,
                unlabelled_share=0.5,
            )
        ) as stream:
            wanted = [stream.train_batches(0), stream.eval_batches("val"), stream.train_batches(1)]
            return [*map(list, wanted), list(stream.eval_batches("labelled"))]

    for rank in range(world_size):
        streamed, held = passes(STREAMED, rank), passes(IN_MEMORY, rank)
        for one, other in zip(streamed, held, strict=True):
            assert_equal_batches(one, other)
        for batch in streamed[0]:
            assert int((batch["label"] < 0).sum()) == len(batch["label"]) // 2
        # an image that is read again is cropped in another way
        first = {}
        rows = torch.cat([batch["row"] for batch in streamed[0]])
        pixels = torch.cat([batch["image"] for batch in streamed[0]])
        for row, image_CHW in zip((rows % len(images.table)).tolist(), pixels):
            first.setdefault(row, []).append(image_CHW)
        again = [one for one in first.values() if len(one) > 1]
        assert again
        assert any(not torch.equal(one[0], one[1]) for one in again)
        # the labelled images are as for evaluation
        assert sum(len(batch["row"]) for batch in streamed[3]) in (100 // world_size, 100)
