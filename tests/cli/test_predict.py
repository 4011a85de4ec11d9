"""``raygkd predict``: what it refuses before Ray starts, and its pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lively import CLASSES, detector_file
from outcomes import png
from PIL import Image
from servers import ObjectStore

from raygkd.data.pictures import find_pictures, read_piece
from raygkd.deploy.facts import Prediction, facts_of
from raygkd.errors import DataError
from raygkd.report.predictions import Pictures

Refused = Callable[..., str]
NAMES = ("class-0", "class-1", "class-2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/none"], "PATH {}/none: no such file or folder"),
        (["{}/empty"], "PATH {}/empty: no images in this folder (known suffixes: jpg jpeg png"),
        (["{}/labels.parquet"], "labels.parquet: has the columns label; expected image (binary"),
        (["{}/broken.parquet"], "broken.parquet: cannot be read as Parquet: "),
        (["{}/1.png", "--out", "{}/a.csv"], "a.csv: must end with .jsonl or .parquet"),
        (["{}/1.png", "--out", "{}/no/a.jsonl"], "there is no folder '{}/no': create it first"),
        (["{}/1.png", "--out", "/proc/a.jsonl"], "--out: '/proc' cannot be written (No such file"),
        (["{}/1.png", "--out", "{}/empty.jsonl"], "empty.jsonl: is a folder"),
        (["{}/1.png", "--draw", "/proc/a"], "--draw /proc/a: cannot be created: No such file"),
        (["{}/1.png", "--draw", "s3://a/b"], "--draw s3://a/b: must be a local folder"),
        (["{}/1.png", "--threshold", "2"], "'--threshold': 2.0 is not in the range 0.0<=x<=1.0"),
        (["{}/1.png", "--address", "127.0.0.1:1"], "no Ray cluster at 127.0.0.1:1"),
    ],
)
def test_wrong_inputs(
    refused: Refused,
    model_file: Callable[..., Path],
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    model = model_file(*NAMES)
    for name in ("empty", "empty.jsonl"):
        (tmp_path / name).mkdir()
    (tmp_path / "1.png").write_bytes(png(1))
    (tmp_path / "broken.parquet").write_bytes(b"no table")
    pq.write_table(pa.table({"label": [1]}), tmp_path / "labels.parquet")
    error = refused("predict", model, *(argument.format(tmp_path) for argument in arguments))
    assert message.format(tmp_path) in error


def test_wrong_models(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(png(1))
    for name, message in (
        ("none.pt", "no such file; pass one written by"),
        ("weights.safetensors", "contains weights only"),
        ("model.onnx", "is damaged or not an ONNX model"),
        ("model.pt2", "is a torch.export program, which can run arbitrary code"),
    ):
        if name != "none.pt":
            (tmp_path / name).write_bytes(b"something else")
        assert message in refused("predict", tmp_path / name, tmp_path / "1.png")


def test_row_groups_that_are_gone_are_told_image_by_image(tmp_path: Path) -> None:
    path = tmp_path / "images.parquet"
    pq.write_table(pa.table({"image": [png(n) for n in range(6)]}), path, row_group_size=4)
    pieces = find_pictures([str(path)])
    assert [(piece.row_group, piece.first_row, piece.images) for piece in pieces] == [
        (0, 0, 4),
        (1, 4, 2),
    ]
    path.unlink()
    lost = list(read_piece(pieces[1]))
    assert [(one.row, one.content) for one in lost] == [(4, b""), (5, b"")]
    assert all("No such file" in one.problem for one in lost)


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/.2.png", ".b/3.png", "c.JPG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(0))
    names = [name for piece in find_pictures([f"{tmp_path}/"]) for name in piece.names]
    assert names == [f"{tmp_path}/a/1.png", f"{tmp_path}/c.JPG"]


def test_boxes_are_drawn_where_they_are(tmp_path: Path) -> None:
    facts = facts_of(detector_file("ssdlite"))
    black = np.zeros((40, 60, 3), np.uint8)
    Image.fromarray(black).save(tmp_path / "black.png")
    pictures = Pictures(tmp_path, facts)
    pictures.add(
        Prediction(
            name="folder/a b.png",
            row=7,
            problem="",
            label=np.array([1]),
            score=np.array([0.5], np.float32),
            box=np.array([[10, 20, 50, 35]], np.float32),
            content=(tmp_path / "black.png").read_bytes(),
        )
    )
    pictures.close()
    with Image.open(tmp_path / "000001-a_b-row-7.png") as drawn:
        # enlarged five times
        assert drawn.size == (300, 200)
        pixels = np.asarray(drawn)
    blue = (0, 0x72, 0xB2)
    assert CLASSES[1] == "dog"
    for x, y in ((50, 150), (250, 150), (150, 100), (150, 175)):
        assert tuple(pixels[y, x]) == blue
    assert not pixels[110:165, 60:240].any()
    # its name stands above the box
    assert (pixels[80:100, 50:100] == 255).all(2).any()


def test_images_in_an_object_store(object_store: ObjectStore) -> None:
    client = object_store.client()
    for name in ("b/2.png", "a/1.png", "a/notes.txt"):
        client.put_object(Bucket=object_store.bucket, Key=f"photos/{name}", Body=png(3))
    folder = f"{object_store.url}/photos"
    [piece] = find_pictures([folder])
    assert piece.names == (f"{folder}/a/1.png", f"{folder}/b/2.png")
    assert [one.content for one in read_piece(piece)] == [png(3), png(3)]
    with pytest.raises(DataError, match="no such file or folder"):
        find_pictures([f"{object_store.url}/none"])
