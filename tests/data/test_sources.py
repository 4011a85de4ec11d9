from __future__ import annotations

import hashlib
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10

from raygkd.data import decode, open_source
from raygkd.errors import ConfigError, DataError


def test_digits_are_all_there_with_a_stratified_test_split():
    source = open_source("digits")
    assert len(source.samples) == 1797
    assert source.class_names == tuple("0123456789")
    assert Counter(sample.split for sample in source.samples) == {"train": 1438, "test": 359}
    per_class = Counter(sample.label for sample in source.samples)
    tested = Counter(sample.label for sample in source.samples if sample.split == "test")
    assert all(abs(tested[label] - per_class[label] / 5) < 1 for label in per_class)


def test_digits_keep_their_pixels():
    from sklearn.datasets import load_digits

    image_CHW = decode(open_source("digits").samples[17].read())
    expected_HW = np.rint(load_digits().images[17] / 16 * 255)
    assert image_CHW.shape == (3, 8, 8)
    assert (image_CHW.numpy() == expected_HW).all()


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"'cifar1'.*did you mean 'cifar10'.*digits"):
        open_source("cifar1")


def test_cifar_without_files_names_folder_and_download(tmp_path):
    with pytest.raises(DataError, match=r"cifar-10-batches-py in '.*'.*--download"):
        open_source("cifar10", tmp_path)


def test_cifar_without_folder_asks_for_it():
    with pytest.raises(ConfigError, match="cifar100 needs --data-dir"):
        open_source("cifar100")


def test_cifar_files_are_read(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    batch = {"data": pixels.reshape(4, -1), "labels": [3, 1, 4, 1]}
    names = {"label_names": [f"kind {label}" for label in range(10)]}
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    digests = {}
    for name, content in (("data", batch), ("names", names)):
        (folder / name).write_bytes(pickle.dumps(content))
        digests[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    # the real loader on small files: only their names and digests differ
    monkeypatch.setattr(CIFAR10, "train_list", [["data", digests["data"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["data", digests["data"]]])
    meta = {"filename": "names", "key": "label_names", "md5": digests["names"]}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    source = open_source("cifar10", tmp_path)
    assert source.class_names == tuple(names["label_names"])
    assert [sample.split for sample in source.samples] == ["train"] * 4 + ["test"] * 4
    assert [sample.label for sample in source.samples[:4]] == [3, 1, 4, 1]
    assert (decode(source.samples[2].read()).numpy() == pixels[2]).all()


def test_image_folder_without_splits_is_all_for_training(make_tree):
    root = make_tree({"dog": 2, "cat/old": 1, "cat/.cache": 1, "cat": 1, ".hidden": 1})
    (root / "cat" / "notes.txt").write_text("not an image")
    (root / "cat" / ".thumb.png").write_text("hidden")
    source = open_source("imagefolder", root)
    assert source.class_names == ("cat", "dog")
    assert [(sample.label, sample.split) for sample in source.samples] == [
        (0, "train"),
        (0, "train"),
        (1, "train"),
        (1, "train"),
    ]
    assert source.samples[0].read() == Path(source.samples[0].origin).read_bytes()


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_image_folder_finds_split_folders(make_tree, name):
    root = make_tree({"train/a": 2, "train/b": 1, f"{name}/b": 1, "test/a": 3})
    source = open_source("imagefolder", root)
    counts = Counter((sample.split, sample.label) for sample in source.samples)
    assert counts == {("train", 0): 2, ("train", 1): 1, ("val", 1): 1, ("test", 0): 3}


def test_class_named_train_is_no_split(make_tree):
    source = open_source("imagefolder", make_tree({"train": 2, "plane": 1}))
    assert source.class_names == ("plane", "train")


def test_suffixes_match_in_any_case(make_tree, encode_image):
    root = make_tree({"a": 0})
    (root / "a" / "PHOTO.JPG").write_bytes(encode_image(kind="JPEG"))
    assert len(open_source("imagefolder", root).samples) == 1


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ({".": 2}, "no class folders in '.*photos'"),
        ({"a": 0, "b": 0}, "no images in the class folders of '.*photos'"),
        ({"a": 1, "empty": 0}, "class 'empty' has no images in '.*photos/empty'"),
        ({"train/a": 1, "test/a": 0, "test/b": 1}, "class 'a' has no images in '.*test/a'"),
        ({"train/a": 1, "val/b": 1}, "class 'b' of '.*val' is not among the training classes"),
        ({"train/a": 1, "val": 3}, "no class folders in '.*val'"),
        ({"train/a": 1, "val/a": 1, "valid/a": 1}, "'.*val' and '.*valid' are the same split"),
    ],
)
def test_bad_image_folder_is_one_clear_line(make_tree, folders, message):
    with pytest.raises(DataError, match=message) as caught:
        open_source("imagefolder", make_tree(folders))
    assert "\n" not in str(caught.value)


def test_missing_image_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no folder '.*nowhere'"):
        open_source("imagefolder", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="imagefolder needs --data-dir"):
        open_source("imagefolder")


def test_images_are_stored_as_the_files_are(make_tree, encode_image):
    root = make_tree({"a": 0})
    jpeg = encode_image(kind="JPEG")
    (root / "a" / "photo.jpeg").write_bytes(jpeg)
    assert open_source("imagefolder", root).samples[0].read() == jpeg
    assert Image.open(root / "a" / "photo.jpeg").format == "JPEG"
