"""A training step with the graph losses, compared with a step of common methods."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from raygkd.bench.rows import Row, Rows
from raygkd.bench.runs import SameBatch, classes_spec, make_training, random_batch, random_scenes
from raygkd.config import dataset_defaults
from raygkd.data.spec import ImageSpec
from raygkd.engine import Training, training_step
from raygkd.engine.measure import MIB, interleaved, peak_bytes, state_bytes

CLASSIFIERS = {"teacher": "resnet32x4", "student": "resnet8x4"}
DETECTORS = {"teacher": "fasterrcnn_resnet101_fpn", "student": "fasterrcnn_resnet50_fpn"}
# what detectors of photographs have where nothing else is given
RECIPE = {**dataset_defaults("coco"), "inherit": False}
# vertices, edges and spectrum, these of a graph for each image
ALL_TERMS = {"method": "graph", "graphs": "image", "beta": 1.0, "gamma": 1.0}
# losses of other graphs: of tokens, of samples and classes, and metrics of graphs of channels
RIVALS = ("trg", "prg", "graph-metrics", "graph+metrics")
# P2 to P5; a few boxes of each image keep the heads at their usual work
PYRAMID = (2, 3, 4, 5)
BOXES = 4


def classifier_rows(device: torch.device, *, quick: bool) -> Rows:
    """Yield seconds and memory of a step of ResNet-32x4 into 8x4 on images of 32 x 32 pixels."""
    size = 32 if quick else 64
    spec = classes_spec(100, 32)
    stream = SameBatch(random_batch(size, spec))
    shared = {**CLASSIFIERS, "batch_size": size}
    methods = {
        "graph": {**shared, **ALL_TERMS},
        "kd": {**shared, "method": "kd"},
    }
    what = f"step of ResNet-32x4 -> 8x4, batch {size}, three levels"
    bound = 1.15 if device.type == "cuda" else 1.2
    trainings = _trainings(methods, spec, stream, device)
    yield _seconds_row(trainings, stream, what, "kd", bound, repeats=5 if quick else 9)
    yield _memory_row(trainings, stream, device, what, "kd")


def rival_rows(device: torch.device, *, quick: bool) -> Rows:
    """Yield seconds of a step with other losses of graphs, of the models of ``classifier_rows``."""
    size = 32 if quick else 64
    spec = classes_spec(100, 32)
    stream = SameBatch(random_batch(size, spec))
    methods = {
        name: {**CLASSIFIERS, "batch_size": size, "method": name} for name in ("kd", *RIVALS)
    }
    steps = _steps(_trainings(methods, spec, stream, device), stream)
    timings = interleaved(steps, 5 if quick else 9)
    for name in RIVALS:
        yield Row(
            what=f"step of ResNet-32x4 -> 8x4, batch {size}, with {name}",
            against="with kd",
            value=timings.ratio(name, "kd"),
            unit="x",
            bound=1.15 if device.type == "cuda" else 1.2,
            configuration={"seconds": timings.medians},
        )


def detector_rows(device: torch.device, *, quick: bool) -> Rows:
    """Yield seconds of a step of Faster R-CNN on ResNet-101 into ResNet-50, four levels."""
    side, size = (160, 1) if quick else (320, 2)
    spec, stream = random_scenes(size, side, BOXES)
    shared = {**RECIPE, **DETECTORS, "batch_size": size, "levels": PYRAMID}
    methods = {"graph": {**shared, **ALL_TERMS}, "fgd": {**shared, "method": "fgd"}}
    what = f"step of Faster R-CNN R101 -> R50, {size} x {side} pixels, four levels"
    trainings = _trainings(methods, spec, stream, device)
    yield _seconds_row(trainings, stream, what, "fgd", 1.0, repeats=5 if quick else 7)


def _trainings(
    methods: Mapping[str, Mapping[str, Any]],
    spec: ImageSpec,
    stream: SameBatch,
    device: torch.device,
) -> dict[str, Training]:
    return {
        name: make_training(settings, spec, stream, device) for name, settings in methods.items()
    }


def _steps(
    trainings: Mapping[str, Training], stream: SameBatch
) -> dict[str, functools.partial[Any]]:
    return {
        name: functools.partial(training_step, training, stream.batch)
        for name, training in trainings.items()
    }


def _seconds_row(
    trainings: Mapping[str, Training],
    stream: SameBatch,
    what: str,
    reference: str,
    bound: float,
    repeats: int,
) -> Row:
    timings = interleaved(_steps(trainings, stream), repeats)
    return Row(
        what=what,
        against=f"with {reference}",
        value=timings.ratio("graph", reference),
        unit="x",
        bound=bound,
        configuration={"amp": str(trainings["graph"].amp), "seconds": timings.medians},
    )


def _memory_row(
    trainings: Mapping[str, Training],
    stream: SameBatch,
    device: torch.device,
    what: str,
    reference: str,
) -> Row:
    needed = {
        name: peak_bytes(functools.partial(training_step, training, stream.batch), device)
        + state_bytes(training)
        for name, training in trainings.items()
    }
    return Row(
        what=f"peak memory, {what}",
        against=f"with {reference}",
        value=needed["graph"] / needed[reference],
        unit="x",
        bound=1.3,
        configuration={"MiB": {name: round(size / MIB, 1) for name, size in needed.items()}},
    )
