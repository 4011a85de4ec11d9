"""Inference in tasks of Ray Data, which read and decode images and apply the model, or here.

Shapes: B batch, S side of the square input, K classes, T maximum predictions of an image, 4 the
sides of a box (x0, y0, x1, y1) in pixels of the image.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from raygkd.data.decoding import decode
from raygkd.data.pictures import Encoded, Piece, read_piece
from raygkd.data.windows import Arrays
from raygkd.deploy.facts import Facts, Prediction
from raygkd.deploy.model import load_model, packed, unpacked
from raygkd.deploy.modules import Run
from raygkd.errors import RunFailed
from raygkd.rayrun.cluster import Resources
from raygkd.storage.atomic_files import Place
from raygkd.storage.temporary import temporary_folder

if TYPE_CHECKING:
    from ray import ObjectRef

# decoded images that a task gives on at a time
BLOCK = 32
# images that this process applies a model to before Ray would have started
FEW = 256


def predict_here(
    model: Place,
    facts: Facts,
    run: Run,
    pieces: Sequence[Piece],
    *,
    batch_size: int,
    top: int,
    threshold: float,
    keep_content: bool,
) -> Generator[Prediction, None, None]:
    """Yield the predictions for each image, in order, without Ray.

    Args:
        model: its file.
        facts, run: of the model, from ``load_model``.
        pieces: the images.
        batch_size, top, threshold, keep_content: as for ``predict``.
    """
    for piece in pieces:
        for block in _blocks(piece, facts, keep_content):
            for batch in _batches(block, batch_size):
                try:
                    rows = _applied(run, batch, facts, top, threshold)
                except Exception as error:
                    reason = f"{type(error).__name__}: {error}".partition("\n")[0]
                    raise RunFailed(f"{model}: cannot be applied: {reason}") from error
                yield from _predictions(rows)


def predict(
    model: Place,
    facts: Facts,
    pieces: Sequence[Piece],
    nodes: Sequence[Resources],
    *,
    batch_size: int,
    top: int,
    threshold: float,
    keep_content: bool,
) -> Generator[Prediction, None, None]:
    """Yield the predictions for each image, in order.

    Args:
        model: its file.
        facts: of the model.
        pieces: the images.
        nodes: resources of each node; a model takes a GPU if there is one.
        batch_size: images per batch.
        top: maximum T.
        threshold: minimum score of a detection.
        keep_content: also return the encoded images.
    """
    import ray

    reference, content = ray.put(list(pieces)), ray.put(packed(model))
    # what asks for the same as the reading is done in its tasks; a task with a GPU is one of its
    # own, whose process would end with it unless it is told to go on
    has_gpus = any(node["GPU"] >= 1 for node in nodes)
    asked = {"num_gpus": 1, "num_cpus": 0, "max_calls": 0} if has_gpus else {"num_cpus": 1}

    def load(batch: Arrays) -> Iterator[Arrays]:
        piece = ray.get(reference)[int(batch["id"][0])]
        yield from _blocks(piece, facts, keep_content)

    def apply(block: Arrays) -> Iterator[Arrays]:
        run = _model(content)
        for batch in _batches(block, batch_size):
            yield _applied(run, batch, facts, top, threshold)

    numbers = [{"id": number} for number in range(len(pieces))]
    dataset = ray.data.from_items(numbers, override_num_blocks=len(pieces)).map_batches(
        load, batch_size=1, batch_format="numpy", num_cpus=1
    )
    dataset = dataset.map_batches(
        apply,
        # a number would put as many pieces into one task, one after the other
        batch_size=None,
        batch_format="numpy",
        **asked,
    )
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    # errors are reported here in one line
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        batches: Any = iter(dataset.iter_batches(batch_size=None, batch_format="numpy"))
        # the execution must have ended before the cluster does, also on Ctrl-C
        with contextlib.closing(batches):
            for rows in batches:
                yield from _predictions(rows)
    except ray.exceptions.RayError as error:
        raise RunFailed(f"{model}: cannot be applied: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return the cause of an error of Ray Data, without its traceback."""
    lines = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception): .*", str(error), re.MULTILINE)
    own = [line for line in lines if not line.startswith("ray.")]
    return own[-1] if own else str(error).partition("\n")[0]


def _blocks(piece: Piece, facts: Facts, keep_content: bool) -> Iterator[Arrays]:
    """Yield the images of a piece in blocks of columns."""
    waiting: list[tuple[Encoded, NDArray[np.uint8], float, tuple[int, int]]] = []
    for encoded in read_piece(piece):
        waiting.append(_prepared(encoded, facts))
        if len(waiting) == BLOCK:
            yield _columns(waiting, keep_content)
            waiting = []
    if waiting:
        yield _columns(waiting, keep_content)


def _batches(block: Arrays, batch_size: int) -> Iterator[Arrays]:
    """Yield the rows of a block in batches."""
    for begin in range(0, len(block["name"]), batch_size):
        yield {name: column[begin : begin + batch_size] for name, column in block.items()}


def _prepared(
    encoded: Encoded, facts: Facts
) -> tuple[Encoded, NDArray[np.uint8], float, tuple[int, int]]:
    """Return an image with its pixels (3, S, S), their ratio, and its own height and width.

    An unreadable one gets a problem and black pixels.
    """
    blank = np.zeros((3, facts.image_size, facts.image_size), np.uint8)
    if encoded.problem:
        return encoded, blank, 1.0, (1, 1)
    try:
        image_CHW = decode(encoded.content)
    except ValueError as error:
        return Encoded(encoded.name, encoded.row, b"", str(error)), blank, 1.0, (1, 1)
    height, width = image_CHW.shape[1:]
    pixels_CSS, ratio = facts.prepare(image_CHW)
    return encoded, pixels_CSS, ratio, (height, width)


def _columns(prepared: Sequence[Any], keep_content: bool) -> Arrays:
    """Return images as columns of equal length."""
    encoded, pixels, ratios, sizes = zip(*prepared)
    return {
        "name": np.array([one.name for one in encoded], object),
        "row": np.array([-1 if one.row is None else one.row for one in encoded], np.int64),
        "problem": np.array([one.problem for one in encoded], object),
        "content": np.array([one.content if keep_content else b"" for one in encoded], object),
        "image": np.stack(pixels),
        "ratio": np.array(ratios, np.float32),
        "size": np.array(sizes, np.float32),
    }


@functools.lru_cache(maxsize=1)
def _model(content: ObjectRef) -> Run:
    """Return the model in this process, which loads it once."""
    import ray

    with temporary_folder("files") as folder:
        return load_model(unpacked(ray.get(content), folder))[1]


def _applied(run: Run, batch: Arrays, facts: Facts, top: int, threshold: float) -> Arrays:
    """Return the columns of a batch with predictions instead of pixels."""
    images_BCSS = torch.from_numpy(np.array(batch.pop("image"))).float().div_(255)
    output = run(images_BCSS)
    ratio_B, size_B2 = batch.pop("ratio"), batch.pop("size")
    if facts.task == "detection":
        return batch | _detections(output[:, :top].numpy(), ratio_B, size_B2, threshold)
    score_BK, label_BK = output.softmax(1).sort(dim=1, descending=True, stable=True)
    return batch | {"label": label_BK[:, :top].numpy(), "score": score_BK[:, :top].numpy()}


def _detections(
    found_BT6: NDArray[np.float32], ratio_B: NDArray, size_B2: NDArray, threshold: float
) -> Arrays:
    """Return labels, scores and boxes on the images; a score of -1 marks padding."""
    # height and width to the limits of x0, y0, x1, y1
    limit_B14 = size_B2[:, None, [1, 0, 1, 0]]
    box_BT4 = np.clip(found_BT6[..., :4] / ratio_B[:, None, None], 0, limit_B14)
    score_BT = found_BT6[..., 4]
    return {
        "label": found_BT6[..., 5].astype(np.int64),
        "score": np.where(score_BT >= threshold, score_BT, np.float32(-1)),
        "box": box_BT4.astype(np.float32),
    }


def _predictions(rows: Arrays) -> Iterator[Prediction]:
    for index, name in enumerate(rows["name"]):
        problem = str(rows["problem"][index])
        # what there is comes first
        count = 0 if problem else int((rows["score"][index] >= 0).sum())
        yield Prediction(
            name=str(name),
            row=int(rows["row"][index]) if rows["row"][index] >= 0 else None,
            problem=problem,
            label=rows["label"][index][:count],
            score=rows["score"][index][:count],
            box=rows["box"][index][:count] if "box" in rows else None,
            content=bytes(rows["content"][index]),
        )
