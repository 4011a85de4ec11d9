"""Doubtful classes and images, which are counted, or refused in strict mode."""

from __future__ import annotations

import logging

import pytest
from layouts import encode_image, tar_members, write_tar

from raygkd.config import DataConfig
from raygkd.data import open_source
from raygkd.data.audit import audit
from raygkd.data.parquet import open_table
from raygkd.data.prepare import prepare
from raygkd.data.run_images import open_images
from raygkd.errors import DataError


def doubtful(make_tree):
    """Return a tree with an image in two splits, a class without images in one, a small class."""
    root = make_tree({"train/a": 3, "train/b": 0, "train/c": 2, "val/a": 0, "val/c": 0})
    for path, seed in (("train/b/9", 9), ("val/a/0", 20), ("val/a/x", 1), ("val/c/x", 21)):
        (root / f"{path}.png").write_bytes(encode_image(seed))
    return root


EXPECTED = [
    "found 1 class with a single image, first in imagefolder ('b')",
    "found 1 class with no images in the val split, first in imagefolder ('b')",
    "found 1 image also present in another split, first in {0}/val/a/x.png ({0}/train/a/1.png)",
]


def test_classes_and_images_are_counted(make_tree):
    root = doubtful(make_tree)
    assert audit(open_source("imagefolder", root)) == tuple(line.format(root) for line in EXPECTED)


COPY = "with a copy that may land in another split ({} cut from train)"


@pytest.mark.parametrize(
    ("others", "missing"), [([], "val and test"), (["val"], "test"), (["val", "test"], None)]
)
def test_copies_that_a_cut_may_part_are_counted(make_tree, others, missing):
    root = make_tree({f"{split}/{name}": 3 for split in ("train", *others) for name in "ab"})
    same = (root / "train/a/0.png").read_bytes()
    for name in ("a/x", "a/y", "b/z"):
        (root / f"train/{name}.png").write_bytes(same)
    # as long as a copy, and equal in its middle
    (root / "train/b/w.png").write_bytes(same[:-1] + bytes([same[-1] ^ 1]))
    warnings = audit(open_source("imagefolder", root))
    if missing is None:
        assert warnings == ()
    else:
        first = f"{root}/train/a/x.png ({root}/train/a/0.png)"
        assert warnings == (f"found 3 images {COPY.format(missing)}, first in {first}",)
        with pytest.raises(DataError, match="with a copy that may land in another split"):
            audit(open_source("imagefolder", root), strict=True)


def test_strict_mode_refuses_before_anything_is_written(make_tree, tmp_path):
    source = open_source("imagefolder", doubtful(make_tree), strict=True)
    with pytest.raises(DataError, match=r"imagefolder: class with a single image.*omit --strict"):
        prepare(source, str(tmp_path / "out"), strict=True)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_warnings_are_logged_by_each_run_and_refused_by_a_strict_one(make_tree, tmp_path, caplog):
    root = doubtful(make_tree)
    prepare(open_source("imagefolder", root), str(tmp_path / "out"))
    assert list(open_table(str(tmp_path / "out")).warnings) == [e.format(root) for e in EXPECTED]
    data = {"dataset": "parquet", "data_dir": str(tmp_path / "out")}
    with caplog.at_level(logging.WARNING, logger="raygkd.data"):
        open_images(DataConfig(**data), seed=0, output=tmp_path)
    assert [record.getMessage() for record in caplog.records] == [e.format(root) for e in EXPECTED]
    with pytest.raises(DataError, match=r"class with a single image.*omit --strict"):
        open_images(DataConfig(**data, strict=True), seed=0, output=tmp_path)


def test_images_in_tar_files_are_compared(tmp_path):
    write_tar(tmp_path / "train.tar", tar_members("1", "1", "2", "2"))
    write_tar(tmp_path / "test.tar", tar_members("2", "1", first=3))
    (warning,) = audit(open_source("webdataset", tmp_path))
    assert warning.startswith("found 1 image also present in another split, first in")


def test_clean_data_has_no_warning(make_tree):
    root = make_tree({"train/a": 2, "train/b": 2})
    assert audit(open_source("imagefolder", root), strict=True) == ()
    assert audit(open_source("digits"), strict=True) == ()
