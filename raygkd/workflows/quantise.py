"""Quantisation of an exported model, and what it changes: ``raygkd export --quantize``.

Shapes: B batch, S side of the square input, K classes, D most detections of an image.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from raygkd.data.plan import cut_windows
from raygkd.data.run_images import Images
from raygkd.data.seeds import generator
from raygkd.data.windows import load_window
from raygkd.deploy.exporters.formats import Calibrated, ExportFormat
from raygkd.deploy.facts import Facts, facts_of
from raygkd.deploy.modules import Run
from raygkd.errors import ConfigError, DataError
from raygkd.metrics.latency import cpu_name, latencies
from raygkd.metrics.model_scores import OutputMeter, as_tensors
from raygkd.metrics.output_comparison import Agreement
from raygkd.metrics.ranking import rank
from raygkd.models import ModelFile
from raygkd.report.console import progress
from raygkd.storage.temporary import temporary_folder

STATIC, DYNAMIC = "int8", "dynamic"
# calibration images, and the largest fall of the score in points, by default
CALIBRATION_IMAGES, MAX_DROP = 256, 0.5
# fewer calibration images do not show the ranges
FEWEST_CALIBRATION_IMAGES = 16
# images that scores are measured on, at most, and that models are timed on
SCORED, TIMED = 1000, 8
BATCH = 32
POINT = 0.01


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """How a model is quantised.

    Attributes:
        kind: "int8", with calibration images, or "dynamic".
        calibration_images: most training images to calibrate on.
        max_drop: largest fall of the score, in hundredths, before layers return to float.
    """

    kind: str = STATIC
    calibration_images: int = CALIBRATION_IMAGES
    max_drop: float = MAX_DROP


def quantisation_of(
    kind: str | None, calibration_images: int | None, max_drop: float | None
) -> Quantisation | None:
    """Return what the options of ``raygkd export`` ask for; None for float.

    Raises:
        ConfigError: options of "int8" without it.
    """
    own = {"calibration_images": calibration_images, "max_drop": max_drop}
    given = {name: value for name, value in own.items() if value is not None}
    if given and kind != STATIC:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"{flags}: needs --quantize {STATIC}; omit it")
    return None if kind is None else Quantisation(kind=kind, **given)  # type: ignore[arg-type]


def quantise(
    wanted: Quantisation,
    chosen: ExportFormat,
    full_run: Run,
    full: Path,
    new: Path,
    model_file: ModelFile,
    images: Images | None,
    calibration: CalibrationImages | None,
    console: Console,
) -> dict[str, Any]:
    """Write a quantised file, and compare it with the float one.

    Args:
        wanted: the kind of quantisation and its settings.
        chosen: the format.
        full_run: the model as loaded from ``full``.
        full: the file in float.
        new: the file to write.
        model_file: of the model; its ranges, if it was trained with them, are not calibrated.
        images: to compare on; None if there are none.
        calibration: for "int8", see ``calibration_images``.
        console: for progress.

    Returns:
        What ``--json`` prints under "int8".

    Raises:
        ConfigError: the model cannot be quantised.
    """
    with progress(console, "scoring float32") as advance:
        advance(0, 1)
        check = _Check(full_run, facts_of(model_file), images)
        advance(1, 1)
    found: dict[str, Any] = {
        "kind": wanted.kind,
        "calibrated_on": None,
        "trained_ranges": bool(model_file.ranges) and wanted.kind == STATIC,
        "float_layers": [],
    }
    if calibration is not None:
        found["calibrated_on"] = None if model_file.ranges else len(calibration.rows)
        with (
            temporary_folder("calibration") as folder,
            progress(console, "quantising") as advance,
        ):
            calibrated = chosen.calibrate(model_file, full, calibration, folder)
            run, left = _accurate(calibrated, new, check, wanted.max_drop, calibration, advance)
        found |= {
            "layers": len(calibrated.layers),
            "float_layers": left,
            "max_drop": wanted.max_drop,
        }
    else:
        run = chosen.quantise(full, new)
    with progress(console, "measuring int8") as advance:
        found |= check.compare(run)
        found |= _timed(full_run, run, check.timed_on(), advance)
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibrationImages:
    """Training images, which are read again, piece by piece, by each loop over them.

    Attributes:
        images: of the run.
        rows: row numbers.
    """

    images: Images
    rows: NDArray[np.int64]

    def __iter__(self) -> Iterator[Tensor]:
        """Yield batches (B, 3, S, S) in 0..1."""
        for batch in load_batches(self.images, self.rows):
            yield pixels(batch)


def calibration_images(images: Images, count: int) -> CalibrationImages:
    """Return a random sample of the readable training images.

    Args:
        images: of the run; validation and test images are not used.
        count: most images of the sample.

    Raises:
        DataError: too few can be read.
    """
    rows = images.rows["train"]
    if not len(rows):
        rows = images.rows.get("unlabelled", rows)
    batches = load_batches(images, _sample(rows, count))
    readable = np.concatenate([np.zeros(0, np.int64), *(batch["row"] for batch in batches)])
    if len(readable) < FEWEST_CALIBRATION_IMAGES:
        raise DataError(
            f"--quantize int8: {len(readable)} training images in '{images.table.path}' are too "
            f"few to calibrate on, at least {FEWEST_CALIBRATION_IMAGES} are needed; raise "
            "--calibration-images, pass --data, or choose --quantize dynamic"
        )
    return CalibrationImages(images=images, rows=readable)


def _sample(rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return rows from all parts of the table, since images of a class may be stored together."""
    return np.sort(generator(0).choice(rows, min(count, len(rows)), replace=False))


def load_batches(images: Images, rows: NDArray[np.int64]) -> Iterator[Mapping[str, np.ndarray]]:
    """Yield the arrays of images as in evaluation, without the unreadable ones."""
    for window in cut_windows(rows, BATCH):
        loaded = load_window(
            images.table,
            window,
            images.transform("val"),
            seed=0,
            epoch=0,
            skip_bad=True,
            exact=False,
        )
        if len(loaded.arrays["row"]):
            yield loaded.arrays


def pixels(batch: Mapping[str, np.ndarray]) -> Tensor:
    """Return the images of a batch (B, 3, S, S) in 0..1."""
    return torch.from_numpy(batch["image"]).float() / 255


class _Check:
    """Compares quantised models with the float one, on validation images or else on noise."""

    def __init__(self, full_run: Run, facts: Facts, images: Images | None):
        self._images, self._facts = images, facts
        self._rows = np.zeros(0, np.int64)
        if images is not None:
            self._rows = _sample(images.rows["val"], SCORED)
        # outputs (B, K) or (B, D, 6) of the float model, and what is true of the images
        self._wanted: list[Tensor] = []
        self._truth: list[dict[str, Tensor]] = []
        for images_BCSS, batch in self._batches():
            self._wanted.append(full_run(images_BCSS))
            self._truth.append(as_tensors({name: batch[name] for name in batch if name != "image"}))
        self._before = self._score(self._wanted)

    def _batches(self) -> Iterator[tuple[Tensor, Mapping[str, np.ndarray]]]:
        if self._images is None or not len(self._rows):
            yield self._noise(), {}
            return
        for batch in load_batches(self._images, self._rows):
            yield pixels(batch), batch

    def _noise(self) -> Tensor:
        side = self._facts.image_size
        return torch.rand(TIMED, 3, side, side, generator=torch.Generator().manual_seed(0))

    def timed_on(self) -> Tensor:
        """Return a few images (B, 3, S, S)."""
        return next(self._batches())[0][:TIMED]

    def _score(self, outputs: list[Tensor]) -> float | None:
        if self._images is None or not len(self._rows) or not self._images.spec.has_labels:
            return None
        meter = OutputMeter(self._images.spec, self._images.table.boxes)
        for output, truth in zip(outputs, self._truth, strict=True):
            meter.update(output, truth)
        return meter.score()

    def _outputs(self, run: Run) -> list[Tensor]:
        return [run(images_BCSS) for images_BCSS, _ in self._batches()]

    def drop(self, run: Run) -> float | None:
        """Return by how many points the score of a model is worse; None if there is no score."""
        if self._before is None:
            return None
        assert self._images is not None
        after, kind = self._score(self._outputs(run)), self._images.spec.score
        if after is None:
            return None
        # 0.90 - 0.895 is a little more than half a point in binary
        return round((rank(self._before, kind) - rank(after, kind)) / POINT, 6)

    def compare(self, run: Run) -> dict[str, Any]:
        """Return how often a model agrees with the float one, and the scores of both."""
        agreement, outputs = Agreement(), self._outputs(run)
        for wanted, got in zip(self._wanted, outputs, strict=True):
            agreement.add(wanted, got)
        return {
            "images": sum(map(len, outputs)) if len(self._rows) else 0,
            "agreement": agreement.share,
            "measure": None if self._images is None else self._images.spec.score,
            "score_before": self._before,
            "score": self._score(outputs),
        }


def _accurate(
    calibrated: Calibrated,
    new: Path,
    check: _Check,
    max_drop: float,
    calibration: CalibrationImages,
    advance: Callable[[int, int, str], None],
) -> tuple[Run, list[str]]:
    """Write a quantised file that is accurate enough; return it and its layers in float.

    Layers with the largest errors return to float first; how many must is found by bisection.
    """

    def is_accurate(run: Run) -> bool:
        drop = check.drop(run)
        return drop is None or drop <= max_drop

    layers = calibrated.layers
    tries = len(layers).bit_length() + 1
    run = calibrated.write(new)
    if is_accurate(run):
        advance(1, 1, "")
        return run, []
    advance(1, tries, "the score falls too far: choosing layers to leave in float")
    errors = calibrated.errors(itertools.islice(calibration, 1))
    worst = sorted(layers, key=lambda layer: errors[layer], reverse=True)
    too_few, enough = 0, len(worst)
    done = 1
    while enough - too_few > 1:
        count = (too_few + enough) // 2
        done += 1
        advance(min(done, tries), tries, f"{count} of {len(layers)} layers in float")
        if is_accurate(calibrated.write(new, worst[:count])):
            enough = count
        else:
            too_few = count
    left = set(worst[:enough])
    return calibrated.write(new, left), [layer for layer in layers if layer in left]


def _timed(
    full_run: Run, run: Run, images_BCSS: Tensor, advance: Callable[[int, int], None]
) -> dict[str, Any]:
    """Return the latency of both models, which take turns."""
    models = {"float32": (full_run, images_BCSS), "int8": (run, images_BCSS)}
    timed = latencies(models, advance)
    return {
        "latency_ms": {name: dataclasses.asdict(one) for name, one in timed.items()},
        "threads": torch.get_num_threads(),
        "hardware": cpu_name(),
    }
