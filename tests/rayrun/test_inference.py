"""``raygkd predict`` says of each image what the model says, in order, and skips broken ones.

Shapes: S side of the square input.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import Command
from lively import CLASSES, classifier_file, detector_file
from PIL import Image

from raygkd.data.decoding import decode
from raygkd.data.pictures import PIECE, find_pictures
from raygkd.deploy.facts import Prediction, facts_of
from raygkd.deploy.model import load_model
from raygkd.deploy.modules import student
from raygkd.errors import RunFailed
from raygkd.models import ModelFile, save_model_file
from raygkd.rayrun.cluster import Resources
from raygkd.rayrun.inference import predict, predict_here
from raygkd.storage.atomic_files import place

# more than a piece, and no whole number of batches
FILES = PIECE + 6
BROKEN = 3


def encoded(seed: int, width: int = 20, height: int = 14) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of folders of images, of which one is broken."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(FILES):
        path = root / f"{number % 2}" / f"{number:03}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(number)[:40] if number == BROKEN else encoded(number))
    (root / "notes.txt").write_text("no image")
    return root


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Parquet file of three row groups, without labels."""
    path = tmp_path_factory.mktemp("table") / "images.parquet"
    images = [encoded(1000 + number, width=9) for number in range(10)]
    pq.write_table(pa.table({"image": images}), path, row_group_size=4)
    return path


def predicted(
    nodes: list[Resources],
    model_file: ModelFile,
    folder: Path,
    paths: Sequence[Path],
    *,
    threshold: float = 0.3,
    keep_content: bool = False,
) -> list[Prediction]:
    save_model_file(folder / "model.pt", model_file)
    return list(
        predict(
            place(folder / "model.pt"),
            facts_of(model_file),
            find_pictures([str(path) for path in paths]),
            nodes,
            batch_size=16,
            top=100,
            threshold=threshold,
            keep_content=keep_content,
        )
    )


def said(model_file: ModelFile, content: bytes) -> tuple[torch.Tensor, float]:
    """Return the model's output for one encoded image, in this process, and the image's ratio."""
    pixels_CSS, ratio = facts_of(model_file).prepare(decode(content))
    with torch.no_grad():
        [output] = student(model_file)(torch.from_numpy(pixels_CSS)[None].float() / 255)
    return output, ratio


@pytest.mark.parametrize("model_file", [classifier_file(), detector_file("ssdlite")])
def test_few_images_get_the_same_without_ray(
    nodes: list[Resources],
    photos: Path,
    table: Path,
    tmp_path: Path,
    model_file: ModelFile,
) -> None:
    paths = [table, photos / "1"]
    by_ray = predicted(nodes, model_file, tmp_path, paths, keep_content=True)
    model = place(tmp_path / "model.pt")
    pieces = find_pictures([str(path) for path in paths])
    options = {"batch_size": 16, "top": 100, "threshold": 0.3, "keep_content": True}
    here = list(predict_here(model, *load_model(model), pieces, **options))
    assert len(here) == 10 + FILES // 2
    for one, other in zip(here, by_ray, strict=True):
        assert (one.name, one.row, one.problem) == (other.name, other.row, other.problem)
        assert (one.label.tolist(), one.content) == (other.label.tolist(), other.content)
        np.testing.assert_allclose(one.score, other.score, atol=1e-6)
        assert (one.box is None) == (other.box is None)
        if one.box is not None and other.box is not None:
            np.testing.assert_allclose(one.box, other.box, atol=1e-3)


def test_classes_in_the_order_of_the_images(
    nodes: list[Resources], photos: Path, table: Path, tmp_path: Path
) -> None:
    model_file = classifier_file()
    single = photos / "1" / "001.png"
    found = predicted(nodes, model_file, tmp_path, [single, table, photos])
    evens, odds = range(0, FILES, 2), range(1, FILES, 2)
    wanted = [(str(single), None, 1)]
    wanted += [(str(table), row, 1000 + row) for row in range(10)]
    wanted += [(f"{photos}/{n % 2}/{n:03}.png", None, n) for n in (*evens, *odds)]
    assert [(one.name, one.row) for one in found] == [(name, row) for name, row, _ in wanted]
    broken = [one for one in found if one.problem]
    assert [one.name for one in broken] == [f"{photos}/1/003.png"]
    assert "not a complete image" in broken[0].problem
    for one, (_, row, seed) in zip(found, wanted, strict=True):
        if one.problem:
            continue
        assert (one.box, one.content) == (None, b"")
        logits, _ = said(model_file, encoded(seed, width=20 if row is None else 9))
        scores, labels = logits.softmax(0).sort(descending=True)
        assert one.label.tolist() == labels.tolist()
        np.testing.assert_allclose(one.score, scores.numpy(), atol=1e-5)


def test_images_that_take_longer_come_in_their_place(
    nodes: list[Resources], table: Path, tmp_path: Path
) -> None:
    file = io.BytesIO()
    Image.new("RGB", (3000, 3000), "red").save(file, "PNG")
    large = tmp_path / "large"
    large.mkdir()
    for number in range(24):
        (large / f"{number:02}.png").write_bytes(file.getvalue())
    found = predicted(nodes, classifier_file(), tmp_path, [large, table])
    assert [one.row for one in found] == [None] * 24 + list(range(10))


def test_boxes_are_in_pixels_of_the_image(
    nodes: list[Resources], table: Path, tmp_path: Path
) -> None:
    model_file = detector_file("ssdlite")
    threshold = 0.2
    found = predicted(nodes, model_file, tmp_path, [table], threshold=threshold, keep_content=True)
    assert sum(len(one.label) for one in found) > 20
    for row, one in enumerate(found):
        # 9 x 14 pixels on a canvas of 64
        output, ratio = said(model_file, one.content)
        assert ratio == pytest.approx(64 / 14)
        wanted = output[output[:, 4] >= threshold].numpy()
        assert one.row == row
        assert one.box is not None
        assert one.label.tolist() == wanted[:, 5].tolist()
        np.testing.assert_allclose(one.score, wanted[:, 4], atol=1e-5)
        limits = np.array([9, 14, 9, 14], np.float32)
        np.testing.assert_allclose(one.box, (wanted[:, :4] / ratio).clip(0, limits), atol=1e-3)


def test_model_that_is_broken_on_the_nodes(
    nodes: list[Resources], table: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"cut off")
    found = predict(
        place(path),
        facts_of(classifier_file()),
        find_pictures([str(table)]),
        nodes,
        batch_size=4,
        top=1,
        threshold=0.5,
        keep_content=False,
    )
    with pytest.raises(RunFailed, match=r"cannot be applied: .*is damaged or not an ONNX model$"):
        list(found)


def test_command(raygkd: Callable[..., Command], photos: Path, tmp_path: Path) -> None:
    """The command from the outside: lines, a sheet, what it tells, and its exit code."""
    save_model_file(tmp_path / "model.pt", classifier_file())
    out, drawn = tmp_path / "found.jsonl", tmp_path / "drawn"
    command = raygkd(
        *("predict", tmp_path / "model.pt", photos / "1", photos / "0"),
        *("--out", out, "--draw", drawn, "--top", 2),
    )
    assert command.wait() == 0, command.err
    assert command.out == ""
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == FILES - 1
    assert lines[0]["image"] == f"{photos}/1/001.png"
    assert lines[-1]["image"] == f"{photos}/0/{FILES - 2:03}.png"
    for line in lines:
        first, second = line["predictions"]
        assert {first["class"], second["class"]} < set(CLASSES)
        assert first["score"] >= second["score"]
    assert f"skipped {photos}/1/003.png: not a complete image" in command.err
    assert f"predicting: {FILES}/{FILES} 1 skipped\n" in command.err
    assert f"{FILES - 1} images, 1 skipped\nwritten to {out}\n" in command.err
    assert "Traceback" not in command.err
    # 69 images on sheets of 64
    assert sorted(path.name for path in drawn.iterdir()) == ["sheet-0001.png", "sheet-0002.png"]
    with Image.open(drawn / "sheet-0001.png") as sheet:
        assert sheet.height > 8 * 112
        assert len(sheet.getcolors(1 << 20) or ()) > 1000
    assert command.gone(30)
