"""Predictions for images, as JSON Lines, Parquet and pictures: ``raygkd predict``."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from raygkd.data.pictures import find_pictures
from raygkd.deploy.facts import Facts, Prediction
from raygkd.deploy.model import load_model
from raygkd.errors import ConfigError, DataError
from raygkd.rayrun.cluster import cluster, is_joined
from raygkd.rayrun.inference import FEW, predict, predict_here
from raygkd.report.console import progress
from raygkd.report.predictions import Pictures
from raygkd.storage.atomic_files import Place, whole_file
from raygkd.workflows.model_locator import new_file, new_folder

# classes reported per image without --top
TOP_CLASSES = 5
# rows of a row group
PARQUET_ROWS = 1024
# unreadable images that are reported one by one
TOLD = 20

Write = Callable[[dict[str, Any]], None]


def predict_images(
    path: Place,
    paths: Sequence[str],
    *,
    out: str | None,
    draw: str | None,
    top: int | None,
    threshold: float,
    batch_size: int,
    address: str | None,
    console: Console,
    stdout: IO[str],
) -> dict[str, int]:
    """Apply a model to images (``raygkd predict``); return the counts of all and skipped images.

    Args:
        path: of the model's file, or of an exported file.
        paths: image files, folders, Parquet files and folders of them.
        out: file of JSON Lines or Parquet; None for lines on ``stdout``.
        draw: folder for pictures; None for none.
        top: maximum predictions per image; None for five classes, or all detections.
        threshold: minimum score of a detection.
        batch_size: images at a time.
        address: of a running cluster; None starts one here.
        console: for progress and skipped images.
        stdout: gets the lines if ``out`` is None.

    Raises:
        UserError: invalid files or settings, or no readable image.
    """
    target = None if out is None else new_file("--out", out, (".jsonl", ".parquet"))
    if target is not None and target.exists():
        raise ConfigError(f"--out {out}: exists; remove it, or choose another name")
    facts, run = load_model(path)
    most = top or (TOP_CLASSES if facts.task == "classification" else 100)
    pieces = find_pictures(paths)
    total = sum(piece.images for piece in pieces)
    if not total:
        raise DataError("PATH: the Parquet files have no rows")
    done = skipped = 0
    with contextlib.ExitStack() as stack:
        write = stack.enter_context(_writer(target, stdout, facts))
        pictures = stack.enter_context(_pictures(draw, facts))
        options: dict[str, Any] = {
            "batch_size": batch_size,
            "top": most,
            "threshold": threshold,
            "keep_content": pictures is not None,
        }
        if total <= FEW and not is_joined(address):
            found = predict_here(path, facts, run, pieces, **options)
        else:
            nodes = stack.enter_context(cluster(address))
            found = predict(path, facts, pieces, nodes, **options)
        advance = stack.enter_context(progress(console, "predicting"))
        advance(0, total)
        for one in stack.enter_context(contextlib.closing(found)):
            done += 1
            if one.problem:
                skipped += 1
                if skipped <= TOLD:
                    console.print(f"skipped {_where(one)}: {one.problem}", soft_wrap=True)
            else:
                write(_record(one, facts))
                if pictures is not None:
                    pictures.add(one)
            advance(done, total, f"{skipped} skipped" if skipped else "")
        if skipped == done:
            raise DataError(f"PATH: none of the {done} images can be read")
    return {"images": done - skipped, "skipped": skipped}


def _where(prediction: Prediction) -> str:
    return prediction.name + ("" if prediction.row is None else f" row {prediction.row}")


def _record(prediction: Prediction, facts: Facts) -> dict[str, Any]:
    """Return the record of an image."""
    said = []
    for index, label in enumerate(prediction.label.tolist()):
        one = {"class": facts.class_names[label], "score": round(float(prediction.score[index]), 6)}
        if prediction.box is not None:
            one["box"] = [round(side, 2) for side in prediction.box[index].tolist()]
        said.append(one)
    row = {} if prediction.row is None else {"row": prediction.row}
    return {"image": prediction.name, **row, "predictions": said}


@contextlib.contextmanager
def _pictures(draw: str | None, facts: Facts) -> Iterator[Pictures | None]:
    """Yield a function that draws predictions, or None."""
    if draw is None:
        yield None
        return
    pictures = Pictures(new_folder("--draw", draw), facts)
    yield pictures
    pictures.close()


@contextlib.contextmanager
def _writer(target: Place | None, stdout: IO[str], facts: Facts) -> Iterator[Write]:
    """Yield a function that writes a record; the file appears when all are written."""
    if target is None:
        yield lambda record: _write_line(stdout, record)
        return
    with whole_file(target) as temporary:
        if target.name.endswith(".jsonl"):
            with temporary.open("w") as file:
                yield lambda record: _write_line(file, record)
            return
        schema = _schema(facts)
        waiting: list[dict[str, Any]] = []
        with pq.ParquetWriter(temporary, schema) as parquet:

            def write(record: dict[str, Any]) -> None:
                waiting.append({"row": None, **record})
                if len(waiting) == PARQUET_ROWS:
                    parquet.write_table(pa.Table.from_pylist(waiting, schema))
                    waiting.clear()

            yield write
            if waiting:
                parquet.write_table(pa.Table.from_pylist(waiting, schema))


def _write_line(file: IO[str], record: dict[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _schema(facts: Facts) -> pa.Schema:
    said = [("class", pa.string()), ("score", pa.float32())]
    if facts.task == "detection":
        said.append(("box", pa.list_(pa.float32(), 4)))
    return pa.schema(
        [("image", pa.string()), ("row", pa.int64()), ("predictions", pa.list_(pa.struct(said)))]
    )
