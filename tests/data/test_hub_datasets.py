"""Local folders of the package datasets, compared with what that package reads itself."""

from __future__ import annotations

import io
import sys

import datasets
import numpy as np
import pytest
from layouts import encode_image
from PIL import Image

from raygkd.data import decode, open_source
from raygkd.errors import ConfigError, DataError

NAMES = ["cat", "dog", "owl"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def table(labels, kind, name="label", extra=None):
    images = [
        {"bytes": encode_image(row, size=(40, 30)), "path": None} for row in range(len(labels))
    ]
    features = datasets.Features({"image": datasets.Image(), name: kind})
    return datasets.Dataset.from_dict({"image": images, name: labels}, features=features)


def written(tmp_path, parts, how="disk"):
    """Write splits as ``save_to_disk`` does, or as Parquet files like those on the hub."""
    root = tmp_path / "set"
    if how == "disk":
        datasets.DatasetDict(parts).save_to_disk(str(root))
        return root
    (root / "data").mkdir(parents=True)
    for split, part in parts.items():
        part.to_parquet(str(root / "data" / f"{split}-00000-of-00001.parquet"))
    return root


@pytest.mark.parametrize("how", ["disk", "parquet"])
def test_images_labels_and_splits_are_those_of_the_package(tmp_path, how):
    kind = datasets.ClassLabel(names=NAMES)
    splits = {"train": [0, 2, 1, 0], "validation": [1, 0], "test": [2]}
    parts = {split: table(labels, kind) for split, labels in splits.items()}
    root = written(tmp_path, parts, how)
    source = open_source("hf", root, strict=True)
    assert source.class_names == tuple(NAMES)
    ours = [(s.split, s.label, decode(s.read()).permute(1, 2, 0).numpy()) for s in source.samples]
    theirs = [
        ({"validation": "val"}.get(split, split), row["label"], np.asarray(row["image"]))
        for split, part in parts.items()
        for row in part
    ]
    assert [row[:2] for row in ours] == [row[:2] for row in theirs]
    assert all(np.array_equal(our[2], their[2]) for our, their in zip(ours, theirs))


def test_labels_without_names_are_ordered(tmp_path):
    root = written(tmp_path, {"train": table([10, 9, 9], datasets.Value("int64"))})
    assert open_source("hf", root).class_names == ("9", "10")
    named = {"train": table(["b", "a"], datasets.Value("string"), name="kind")}
    other = written(tmp_path / "other", named)
    assert open_source("hf", other, own={"label": "kind"}).class_names == ("a", "b")
    with pytest.raises(DataError, match="the columns are image, kind; expected images, and a col"):
        open_source("hf", other)
    with pytest.raises(ConfigError, match=r"no column 'none' .columns: image, kind"):
        open_source("hf", other, own={"label": "none"})


@pytest.mark.parametrize("is_struct", [True, False])
def test_objects_have_boxes_with_width_and_height(tmp_path, is_struct):
    fields = {
        "bbox": datasets.List(datasets.Value("float32"), length=4),
        "category": datasets.ClassLabel(names=NAMES),
    }
    boxes, labels = [[1, 2, 10, 12], [0, 0, 40, 30]], [2, 0]
    if is_struct:
        kind = {name: datasets.List(field) for name, field in fields.items()}
        objects = [{"bbox": boxes, "category": labels}, {"bbox": [], "category": []}]
    else:
        kind = datasets.List(fields)
        each = [{"bbox": box, "category": label} for box, label in zip(boxes, labels)]
        objects = [each, []]
    root = written(tmp_path, {"train": table(objects, kind, name="objects")})
    first, second = open_source("hf", root, strict=True).samples
    assert first.boxes.xyxy.tolist() == [[1, 2, 11, 14], [0, 0, 40, 30]]
    assert first.boxes.label.tolist() == labels
    assert len(second.boxes) == 0


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        ([[0, 1], [1]], datasets.List(datasets.ClassLabel(names=NAMES)), "has lists .multi-label"),
        ([0.5, 1.0], datasets.Value("float32"), "has numbers such as 0.5; only one class per im"),
        ([0, -1], datasets.ClassLabel(names=NAMES), "train row 1: no label"),
        (["a|b", "a"], datasets.Value("string"), "name several classes"),
    ],
)
def test_other_kinds_of_labels_are_refused(tmp_path, labels, kind, message):
    root = written(tmp_path, {"train": table(labels, kind)})
    with pytest.raises(DataError, match=message) as caught:
        open_source("hf", root)
    assert "\n" not in str(caught.value)


def test_splits_of_other_names_are_refused(tmp_path):
    kind = datasets.ClassLabel(names=NAMES)
    parts = {"train": table([0], kind), "unsupervised": table([0], kind)}
    with pytest.raises(DataError, match="has the splits train, unsupervised; expected train, val"):
        open_source("hf", written(tmp_path, parts))


def test_name_that_cannot_be_fetched_is_one_line():
    with pytest.raises(DataError, match=r"'org/none' cannot be loaded: .*--download fetches") as e:
        open_source("hf:org/none")
    assert "\n" not in str(e.value)
    with pytest.raises(ConfigError, match="name a data set, as in hf:ORG/NAME"):
        open_source("hf")


def test_missing_package_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'raygkd\[datasets\]'"):
        open_source("hf", tmp_path)


def test_images_that_are_files_are_read(tmp_path):
    for name in NAMES:
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "0.png").write_bytes(encode_image(size=(40, 30)))
    source = open_source("hf", tmp_path / "photos")
    assert source.class_names == tuple(NAMES)
    assert Image.open(io.BytesIO(source.samples[0].read())).size == (40, 30)
