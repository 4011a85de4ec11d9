"""Files and names that data sets do not take: places outside, links, doubles, gaps, overwriting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raygkd.cli import main
from raygkd.data.parquet import open_table
from raygkd.data.sources import open_source
from raygkd.errors import ConfigError, DataError, TrackingError
from raygkd.report.console import stderr_console
from raygkd.storage.atomic_files import place
from raygkd.tracking.store import existing_store
from raygkd.workflows.predict import predict_images


def write_image(path: Path) -> None:
    """Write a small image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), 100, np.uint8)).save(path)


@pytest.mark.parametrize("name", ["../secret.png", "a/../../secret.png", "/etc/secret.png"])
def test_coco_images_outside_of_their_folder(tmp_path: Path, name: str) -> None:
    write_image(tmp_path / "secret.png")
    write_image(tmp_path / "coco" / "train" / "1.png")
    contents: dict[str, Any] = {
        "images": [{"id": 1, "file_name": name}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4]}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    path = tmp_path / "coco" / "train" / "_annotations.coco.json"
    path.write_text(json.dumps(contents))
    with pytest.raises(DataError) as refused:
        open_source("coco", tmp_path / "coco")
    assert f"images[0] has file_name '{name}', which is outside the folder" in str(refused.value)


def test_a_class_folder_that_links_to_its_parent(tmp_path: Path) -> None:
    write_image(tmp_path / "cat" / "1.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    with pytest.raises(DataError, match=r"loop' links to a folder that contains it; remove the"):
        open_source("imagefolder", tmp_path)


def test_a_table_with_a_column_twice(tmp_path: Path) -> None:
    write_image(tmp_path / "1.png")
    (tmp_path / "labels.csv").write_text("image,label,label\n1.png,cat,dog\n")
    with pytest.raises(DataError, match="has the column 'label' twice; rename one of them"):
        open_source("csv", tmp_path)
    label = pa.array([0])
    table = pa.table([pa.array([b""]), label, label], names=["image", "label", "label"])
    pq.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(DataError, match="has the column 'label' twice; remove one of them"):
        open_table(str(tmp_path / "twice.parquet"))


def test_labels_that_leave_out_numbers_are_reported(tmp_path: Path) -> None:
    images = pa.array([b"a", b"b", b"c"])
    pq.write_table(pa.table({"image": images, "label": [0, 1, 7]}), tmp_path / "gaps.parquet")
    [warning] = open_table(str(tmp_path / "gaps.parquet")).warnings
    assert warning == "found no image of 5 of 8 classes, first of label 2"
    pq.write_table(pa.table({"image": images, "label": [0, 1, 2]}), tmp_path / "whole.parquet")
    assert open_table(str(tmp_path / "whole.parquet")).warnings == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "there is no MLflow store"), (b"no database", "file is not a database; choose another")],
)
def test_a_store_that_is_none(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mlflow.db"
    path.write_bytes(content)
    with pytest.raises(TrackingError, match=message):
        existing_store("models:/x@champion", f"sqlite:///{path}")
    assert path.read_bytes() == content


def test_predictions_that_exist_are_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "found.jsonl"
    out.write_text("of yesterday\n")
    with pytest.raises(ConfigError, match="exists; remove it, or choose another name"):
        predict_images(
            place(tmp_path / "model.pt"),
            [str(tmp_path)],
            out=str(out),
            draw=None,
            top=None,
            threshold=0.5,
            batch_size=1,
            address=None,
            console=stderr_console(),
            stdout=out.open(),
        )
    assert out.read_text() == "of yesterday\n"


def test_an_option_twice(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    words = ["raygkd", "tune", "--config", "a.yaml", "--config", "b.yaml"]
    monkeypatch.setattr(main.sys, "argv", words)
    assert main.run() == 2
    assert capfd.readouterr().err == "error: --config: is given twice; pass one file\n"
