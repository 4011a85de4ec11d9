"""Distillation in 8 bits: the graph that is trained, and what it gains.

Shapes: B batch, S side of the square input.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from raygkd.config import Config
from raygkd.data.run_images import Images
from raygkd.deploy.exporters.onnx import write_onnx
from raygkd.deploy.exporters.static_int8 import StaticInt8
from raygkd.deploy.exporters.training_graph import own_weights, training_graph
from raygkd.deploy.modules import Run
from raygkd.engine.tasks import pixels
from raygkd.errors import ConfigError, DataError
from raygkd.losses import baseline_class, baseline_of
from raygkd.metrics.metric import RegisteredMeter
from raygkd.metrics.verdict import comparison_line, verdict
from raygkd.models import ModelFile, load_model_file
from raygkd.models.fake_quantised import FakeQuantised, QuantisedGraph
from raygkd.models.files import read_tensors
from raygkd.optional_packages import require
from raygkd.rayrun.image_stream import RayStream
from raygkd.registry import FORMATS
from raygkd.report.console import progress
from raygkd.storage.atomic_files import Place, whole_file
from raygkd.storage.temporary import temporary_folder
from raygkd.workflows.quantise import CALIBRATION_IMAGES, CalibrationImages, calibration_images
from raygkd.workflows.session import Session

# the graph and its ranges, in the folder of the run
GRAPH = "graph.pt"
FLOAT, CALIBRATED, DISTILLED = "float", "calibrated", "distilled"
_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantisedStudent:
    """A finished student that is trained in 8 bits.

    Attributes:
        source: the student in float.
        graph: with which it is trained.
        calibration: the images of its ranges.
    """

    source: ModelFile
    graph: QuantisedGraph
    calibration: CalibrationImages

    def save(self, folder: Place) -> None:
        """Write the graph to the folder of a run."""
        with whole_file(folder / GRAPH) as temporary, temporary.open("wb") as file:
            torch.save(self.graph.to_mapping(), file)

    def own_weights(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the student's state dict for that of its ``FakeQuantised`` in a checkpoint."""
        module = FakeQuantised(self.graph)
        module.load_state_dict(state)
        return own_weights(self.source, self.graph, module.trained())


def check_method(config: Config) -> None:
    """Refuse missing packages, and methods that read what the graph does not have.

    Raises:
        ConfigError: names the package, or the method.
    """
    require(*FORMATS.get("onnx").packages, of="--quantize int8")
    baseline = baseline_of(config.method.method)
    if baseline is not None and baseline_class(baseline).reads_proxies():
        raise ConfigError(
            f"--quantize int8: --method {config.method.method} reads the weights of the last "
            "layer, which are rounded in 8 bits; choose another, such as --method graph+kd"
        )


def quantised_student(
    config: Config, images: Images, resume: Place | None, console: Console
) -> QuantisedStudent:
    """Return the student of a run with its graph, which is calibrated unless it is resumed.

    Args:
        config: of the run; ``student_weights`` is the model file.
        images: of the run.
        resume: folder of the run to resume.
        console: for progress.

    Raises:
        ConfigError: the student cannot be trained in 8 bits.
        DataError: too few images to calibrate on, or a damaged file.
    """
    assert config.model.student_weights is not None
    source = load_model_file(config.model.student_weights)
    calibration = calibration_images(images, CALIBRATION_IMAGES)
    if resume is not None and (resume / GRAPH).exists():
        graph = _read_graph(resume / GRAPH)
    else:
        with progress(console, "calibrating") as advance, temporary_folder("graph") as folder:
            advance(0, 1)
            graph = training_graph(source, calibration, folder)
            advance(1, 1)
    return QuantisedStudent(source=source, graph=graph, calibration=calibration)


def _read_graph(path: Place) -> QuantisedGraph:
    try:
        return QuantisedGraph.from_mapping(read_tensors(path))
    except Exception as error:  # what the unpickler raises on foreign bytes has no common type
        raise DataError(f"{path} is damaged; remove the run's folder to train anew") from error


def compare_in_8_bits(
    session: Session, student: QuantisedStudent, trained: ModelFile
) -> dict[str, Any] | None:
    """Return the part of ``--json`` under "int8"; None without labels.

    "scores" on the test split are those of the files that are exported, with all layers in 8 bits:
    of the student that training started from in float and calibrated, and of the trained one.
    "against_calibrated" and "against_float" are its verdicts.
    """
    images = session.images
    if not images.spec.has_labels:
        return None
    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(progress(session.console, "scoring in 8 bits"))
        advance(0, 2)
        folder = stack.enter_context(temporary_folder("int8"))
        runs = {FLOAT: write_onnx(student.source, folder / "float.onnx")}
        of_file = {CALIBRATED: student.source, DISTILLED: trained}
        for name, file in of_file.items():
            ranges = student.graph.ranges if name == DISTILLED else {}
            runs[name] = _int8(file, student.calibration, ranges, folder / name)
        advance(1, 2)
        found = _scores(session, runs)
        advance(2, 2)
    score, classes = images.spec.score, len(images.spec.class_names)
    result: dict[str, Any] = {"scores": {name: one["score"] for name, one in found.items()}}
    for other, title in ((CALIBRATED, "int8 by calibration"), (FLOAT, "float")):
        told = verdict(score, classes, [found[DISTILLED]], [found[other]])
        told["other"] = told.pop("student_alone")
        line = comparison_line(told, "int8 after distillation", title)
        result[f"against_{other}"] = told | {"line": line}
    return result


def _int8(
    file: ModelFile,
    calibration: CalibrationImages,
    ranges: Mapping[str, tuple[float, float]],
    folder: Path,
) -> Run:
    folder.mkdir()
    source = folder / "float.onnx"
    write_onnx(file, source)
    return StaticInt8(source, calibration, folder, ranges).write(folder / "int8.onnx")


def _scores(session: Session, runs: Mapping[str, Run]) -> dict[str, dict[str, Any]]:
    """Return name -> "score" and "parts" of a model on the test split."""
    spec = session.images.spec
    meters = {
        name: RegisteredMeter("classification", len(spec.class_names), spec.score) for name in runs
    }
    stream = RayStream(
        session.shared,
        batch_size=session.config.optim.batch_size,
        seed=0,
        epochs=range(0),
        rank=0,
        world_size=1,
    )
    with contextlib.closing(stream):
        for batch in stream.eval_batches("test"):
            images_BCSS = pixels(batch, _CPU)
            for name, run in runs.items():
                meters[name].update(run(images_BCSS), batch["label"])
    return {
        name: {"score": meter.added_to({})[spec.score], "parts": meter.parts()}
        for name, meter in meters.items()
    }


def with_ranges(file: ModelFile, student: QuantisedStudent | None) -> ModelFile:
    """Return a trained model's file with the ranges of its training."""
    if student is None:
        return file
    return dataclasses.replace(file, ranges=dict(student.graph.ranges))
