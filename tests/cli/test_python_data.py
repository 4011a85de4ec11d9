"""Images that a Python program passes as torch or Ray data sets."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset, random_split

import raygkd
from raygkd.data.decoding import decode
from raygkd.data.images import Images, write_images
from raygkd.data.parquet import open_table
from raygkd.errors import ConfigError, DataError

SMALL = {"epochs": 1, "method": "kd", "teacher": "resnet8", "student": "resnet8"}


def pixels(count: int, seed: int = 0) -> torch.Tensor:
    """Return uint8 images (count, 3, 8, 8)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)


class Named(Dataset[Any]):
    """Images whose classes have names, as torchvision's data sets have them."""

    classes = ("cat", "dog")

    def __init__(self, count: int, seed: int = 0):
        self.images = pixels(count, seed)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image = self.images[index].permute(1, 2, 0).numpy()
        return Image.fromarray(image), index % 2


def written(folder: Path) -> list[tuple[str, int, torch.Tensor]]:
    """Return split, label and pixels of the images of a folder."""
    table = open_table(str(folder))
    encoded = pq.read_table(folder, columns=["image"])["image"].to_pylist()
    return [
        (("train", "val", "test")[split], label, decode(image))
        for split, label, image in zip(table.splits, table.labels, encoded, strict=True)
    ]


@pytest.mark.unit
def test_images_are_written_as_they_are(tmp_path: Path) -> None:
    given = pixels(4)
    buffer = io.BytesIO()
    Image.fromarray(given[1].permute(1, 2, 0).numpy()).save(buffer, "png")
    forms: list[Any] = [
        given[0],
        buffer.getvalue(),
        given[2].permute(1, 2, 0).numpy(),
        given[3].float() / 255,
    ]
    train = [(form, label) for form, label in zip(forms, (0, "b", np.int64(1), None), strict=True)]
    val = ({"image": image, "label": torch.tensor(1)} for image in given[:1])
    folder = write_images(Images(train=train, val=val, class_names=["a", "b"]), tmp_path)
    found = written(folder)
    assert open_table(str(folder)).class_names == ("a", "b")
    assert [split for split, _, _ in found] == ["train"] * 4 + ["val"]
    for image, label in zip(given, (0, 1, 1, -1), strict=True):
        assert any(label == one and torch.equal(image, seen) for _, one, seen in found[:4])
    assert torch.equal(found[4][2], given[0])


@pytest.mark.unit
def test_the_folder_is_named_after_the_images(tmp_path: Path) -> None:
    first = write_images(Images(train=Named(6)), tmp_path)
    assert write_images(Images(train=Named(6)), tmp_path) == first
    assert write_images(Images(train=Named(6, seed=1)), tmp_path) != first
    assert len(list(tmp_path.iterdir())) == 2
    parts = random_split(Named(6), [4, 2])
    assert open_table(str(write_images(Images(train=parts[0], val=parts[1]), tmp_path))).class_names


@pytest.mark.unit
@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([], "data: train has no images"),
        ([3], "train[0] is a int; it must be (image, label)"),
        ([(b"no image", 0)], "data: train[0]: not a complete image"),
        ([(pixels(1)[0], 2)], "train[0]: label 2 (allowed: 0 to 1, or the name of a class)"),
        ([(pixels(1)[0], 0.5)], "train[0]: label 0.5 (allowed: 0 to 1"),
        ([(pixels(1)[0], {"boxes": 1})], "boxes and several labels need a data set in files"),
        ([(torch.randn(3, 8, 8), 0)], "pass images before they are normalised"),
        ([(torch.full((3, 8, 8), torch.nan), 0)], "from nan to nan"),
        ([(pixels(1)[0].long(), 0)], "but is int64"),
        ([(torch.zeros(4, 8, 8), 0)], "but has the shape (4, 8, 8)"),
    ],
)
def test_mistakes_in_data_are_refused(tmp_path: Path, train: Any, message: str) -> None:
    with pytest.raises(DataError) as refused:
        write_images(Images(train=train, class_names=["a", "b"]), tmp_path)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.unit
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": Named(2)}, "data: is a Named; pass raygkd.Images(train=..., val=..., test=...)"),
        ({"data": Images(train=[]), "data_dir": "x"}, "data: data_dir names other images"),
        ({"data": Images(train=[]), "output": "s3://bucket/x"}, "is in an object store"),
        ({"data": Images(train=Named(2)), "epochs": 0}, "--epochs 0: must be at least 1"),
    ],
)
def test_mistakes_beside_data_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        raygkd.train(**{"output": tmp_path, **settings})
    assert message in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.unit
def test_an_error_of_the_data_set_says_where_it_was(tmp_path: Path) -> None:
    class Broken(Named):
        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone") as raised:
        write_images(Images(train=Broken(4)), tmp_path)
    assert raised.value.__notes__ == ["raygkd was reading image 0 (from 0) of train"]


@pytest.mark.unit
def test_classes_need_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"class_names is None; pass the name of each class"):
        write_images(Images(train=TensorDataset(pixels(2), torch.tensor([0, 1]))), tmp_path)
    with pytest.raises(DataError, match="class_names has a name twice"):
        write_images(Images(train=Named(2), class_names=["a", "a"]), tmp_path)


@pytest.mark.ray
def test_a_student_learns_from_a_torch_data_set(tmp_path: Path) -> None:
    data = Images(train=Named(96), test=Named(16, seed=1))
    run = raygkd.train(data=data, **SMALL, teacher_epochs=1, output=tmp_path, tracking_uri=None)
    assert run.settings["data"]["data_dir"].startswith(str(tmp_path / "inputs"))
    assert run.model()(torch.rand(1, 3, 8, 8)).shape == (1, 2)


@pytest.fixture
def session() -> Iterator[None]:
    """A Ray session that the program opened before."""
    ray.init(num_cpus=2, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


@pytest.mark.ray
@pytest.mark.usefixtures("session")
def test_a_ray_data_set_is_learned_from_in_the_open_session(tmp_path: Path) -> None:
    rows = [
        {"image": image.permute(1, 2, 0).numpy(), "label": number % 2}
        for number, image in enumerate(pixels(96))
    ]
    data = Images(train=ray.data.from_items(rows), class_names=["cat", "dog"])
    alone = {**SMALL, "method": "none", "output": tmp_path, "tracking_uri": None}
    run = raygkd.train(data=data, **alone)
    assert ray.is_initialized()
    assert run.settings["cluster"]["address"] == ray.get_runtime_context().gcs_address
    with pytest.raises(ConfigError, match=r"this process has a Ray session of another cluster"):
        raygkd.train(data=data, **alone, address="127.0.0.1:1")
