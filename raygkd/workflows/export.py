"""Export a model to another format and compare the two: ``raygkd export``.

Shapes: B batch, S side of the square input.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from raygkd.data.run_images import Images
from raygkd.deploy.exporters.formats import ExportFormat
from raygkd.deploy.facts import Facts, facts_of
from raygkd.deploy.modules import Run, student
from raygkd.errors import ConfigError, RunFailed, UserError
from raygkd.metrics.output_comparison import TOLERANCE, Comparison
from raygkd.models import (
    LoadedWeights,
    ModelFile,
    build_from_file,
    count_parameters,
    load_model_file,
    short_name,
)
from raygkd.optional_packages import require
from raygkd.registry import FORMATS
from raygkd.report.card import model_card
from raygkd.report.console import progress
from raygkd.storage.atomic_files import Place, whole_file
from raygkd.storage.temporary import temporary_folder
from raygkd.workflows.model_images import given_images, own_images
from raygkd.workflows.model_locator import find_model, new_file
from raygkd.workflows.quantise import (
    STATIC,
    Quantisation,
    calibration_images,
    load_batches,
    pixels,
    quantise,
)
from raygkd.workflows.resume import RESULT
from raygkd.workflows.run_files import read_result

# images that outputs are compared on
RANDOM_BATCHES = (1, 3)
SAMPLE = 32


def export(
    model: str,
    *,
    format: str,
    out: str,
    quantisation: Quantisation | None,
    licence: str,
    data: str | None,
    output: str,
    tracking_uri: str | None,
    console: Console,
) -> dict[str, Any]:
    """Write a model in another format (``raygkd export``); return what ``--json`` prints.

    The exported file is run and compared with the model before it is moved to its final name.

    Args:
        model: as for ``find_model``.
        format: name of a registered format.
        out: the file to write.
        quantisation: how to write the model in 8 bits, if the format supports it; None for float.
        licence: of the weights, for the model card.
        data: Parquet images to compare on; None for those that the model was trained on.
        output: folder of the runs, for registered models.
        tracking_uri: of the MLflow store, for registered models.
        console: for progress.

    Raises:
        UserError: files, settings or packages that cannot be used.
        RunFailed: the exported file does not reproduce the model.
    """
    chosen: ExportFormat = FORMATS.get(format)()
    target = _target(format, out, quantisation)
    path = find_model(model, tracking_uri=tracking_uri, output=output)
    model_file = load_model_file(path)
    facts_of(model_file)
    if model_file.weights:
        weights = LoadedWeights.from_mapping(model_file.weights)
        if weights.forbids_commercial_use:
            console.print(
                f"warning: training started from {weights.source}, whose licence "
                f"{weights.licence} forbids commercial use",
                soft_wrap=True,
            )
    images, why_none = _images(model_file, data, quantisation, console)
    calibration = None
    if quantisation and quantisation.kind == STATIC:
        assert images is not None
        calibration = calibration_images(images, quantisation.calibration_images)
    result: dict[str, Any] = {
        "model": short_name(model_file.name),
        "source": str(path),
        "format": format,
        "out": str(target),
        "opset": chosen.opset,
        "parameters": count_parameters(build_from_file(model_file)),
        "card": None,
        "compared_on": images.table.path if images else None,
        "no_images": why_none,
        "int8": None,
    }
    with contextlib.ExitStack() as stack:
        # what is entered first is named last: the first file appears when all others are there
        new = [
            stack.enter_context(whole_file(target.parent / name))
            for name in chosen.names(target.name)
        ]
        if chosen.has_card:
            card = target.parent / f"{Path(target.name).stem}.md"
            text = model_card(
                model_file,
                facts_of(model_file),
                parameters=result["parameters"],
                file=target.name,
                licence=licence,
                test_scores=_test_scores(path.parent),
            )
            stack.enter_context(whole_file(card)).write_text(text)
            result["card"] = str(card)
        folder = stack.enter_context(temporary_folder("files"))
        written = full = folder / f"full{chosen.suffix}"
        with progress(console, f"writing {format}") as advance:
            advance(0, 2)
            run = chosen.write(model_file, full)
            advance(1, 2, "comparing")
            result["check"] = _checked(model_file, run, images)
            advance(2, 2)
        if quantisation:
            written = folder / f"int8{chosen.suffix}"
            result["int8"] = quantise(
                quantisation,
                chosen,
                run,
                full,
                written,
                model_file,
                images,
                calibration,
                console,
            )
            result["int8"]["bytes_before"] = _size(folder, chosen.names(full.name))
        for name, file in zip(chosen.names(written.name), new, strict=True):
            shutil.copyfile(folder / name, file)
        result["bytes"] = _size(folder, chosen.names(written.name))
    return result


def _size(folder: Path, names: Iterable[str]) -> int:
    """Return the bytes of all files together."""
    return sum((folder / name).stat().st_size for name in names)


def _target(format: str, out: str, quantisation: Quantisation | None) -> Place:
    """Return the path of the new file.

    Raises:
        ConfigError: packages that are missing, or a file that cannot be written there.
    """
    chosen = FORMATS.get(format)
    if quantisation and quantisation.kind not in chosen.quantised:
        kind = quantisation.kind
        able = [name for name in FORMATS.names() if kind in FORMATS.get(name).quantised]
        raise ConfigError(
            f"--quantize {kind}: needs --format {' or '.join(able)}, not {format}; omit it"
        )
    require(*chosen.packages, of=f"--format {format}", extra=chosen.extra)
    target = new_file("--out", out, (chosen.suffix,))
    for name in chosen().names(target.name):
        if isinstance(target, Path) and (target.parent / name).is_dir():
            raise ConfigError(
                f"--out {out}: there is a folder '{target.parent / name}'; choose another"
            )
    return target


def _images(
    model_file: ModelFile, data: str | None, quantisation: Quantisation | None, console: Console
) -> tuple[Images | None, str | None]:
    """Return images for the comparison and for calibration, or why there are none.

    Raises:
        UserError: the given images cannot be used, or there are none to calibrate on.
    """
    if data is not None:
        return given_images(model_file, data, console), None
    try:
        return own_images(model_file, console), None
    except UserError as error:
        if quantisation and quantisation.kind == STATIC:
            raise type(error)(
                f"--quantize int8: needs training images: {error}, or choose --quantize dynamic"
            ) from error
        return None, str(error)


def _checked(model_file: ModelFile, run: Run, images: Images | None) -> dict[str, Any]:
    """Return the differences between the exported file and the model.

    Raises:
        RunFailed: they are larger than rounding explains.
    """
    facts, original, comparison = facts_of(model_file), student(model_file), Comparison()
    side = facts.image_size if facts.task == "detection" else None
    samples = 0
    for images_BCSS in _inputs(facts, images):
        with torch.inference_mode():
            wanted = original(images_BCSS)
        comparison.add(wanted, run(images_BCSS), side)
    if images is not None:
        samples = comparison.images - sum(RANDOM_BATCHES)
    if not comparison.is_equal:
        detail = (
            f" and {comparison.alone} of {comparison.detections} detections unmatched"
            if side
            else ""
        )
        raise RunFailed(
            f"the exported {short_name(model_file.name)} differs from the model by "
            f"{comparison.largest:.2g}{detail}, more than {TOLERANCE:g}: nothing was written"
        )
    return {**dataclasses.asdict(comparison), "sample_images": samples, "tolerance": TOLERANCE}


def _inputs(facts: Facts, images: Images | None) -> Iterator[Tensor]:
    """Yield batches of different sizes in 0..1: random ones, and images."""
    generator = torch.Generator().manual_seed(0)
    for count in RANDOM_BATCHES:
        yield torch.rand(count, 3, facts.image_size, facts.image_size, generator=generator)
    if images is not None:
        for batch in load_batches(images, images.rows["val"][:SAMPLE]):
            yield pixels(batch)


def _test_scores(folder: Place) -> dict[str, float]:
    """Return role -> score on the test split of the models of a finished run."""
    if not (folder / RESULT).exists():
        return {}
    result = read_result(folder / RESULT)
    models = result.get("models") or {
        role: result[role] for role in ("teacher", "student_alone", "best") if role in result
    }
    scores = {role: model["test_score"] for role, model in models.items()}
    return {role: score for role, score in scores.items() if score is not None}
