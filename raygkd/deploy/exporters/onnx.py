"""ONNX files, optionally with 8-bit weights.

Shapes: B batch, K classes, N candidates, D most detections of an image, S side of the square input,
U kept candidates.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raygkd.deploy.exporters.formats import Calibrated, ExportFormat
from raygkd.deploy.exporters.static_int8 import StaticInt8
from raygkd.deploy.exporters.tracing import (
    DETECTIONS,
    IMAGES,
    LOGITS,
    ExportableDetector,
    example_images,
    quiet,
)
from raygkd.deploy.facts import Facts, facts_of
from raygkd.deploy.modules import DeployedClassifier, Run
from raygkd.deploy.onnx_session import open_onnx
from raygkd.errors import ConfigError
from raygkd.models import ModelFile, is_detector, short_name
from raygkd.models.fixed_shapes import suppress
from raygkd.registry import FORMATS

# the oldest that torch's exporter writes without conversion; onnxruntime reads it since 1.14
OPSET = 18
_INT64_MAX = 2**63 - 1


@torch.library.custom_op("raygkd::suppress", mutates_args=())
def _suppress(boxes: Tensor, scores: Tensor, overlap: float, threshold: float) -> Tensor:
    """Call ``suppress`` as one node of the graph, because ONNX has an operator for it."""
    return suppress(boxes, scores, overlap, threshold)


@_suppress.register_fake
def _(boxes: Tensor, scores: Tensor, overlap: float, threshold: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def _onnx_suppress(boxes: Any, scores: Any, overlap: float, threshold: float) -> Any:
    """Return the ONNX nodes of ``suppress`` for boxes (B, K, N, 4) and scores (B, K, N)."""
    from onnxscript import opset18 as op

    candidates = op.Shape(scores, start=2)
    all_groups = op.Constant(value_ints=[-1])
    four = op.Constant(value_ints=[4])
    # in ONNX, the classes of an image share their boxes, so each class is passed as an image
    flat_boxes = op.Reshape(boxes, op.Concat(all_groups, candidates, four, axis=0))
    one_class = op.Constant(value_ints=[1])
    flat_scores = op.Reshape(scores, op.Concat(all_groups, one_class, candidates, axis=0))
    places_U3 = op.NonMaxSuppression(
        flat_boxes,
        flat_scores,
        op.Constant(value_ints=[_INT64_MAX]),
        op.Constant(value_floats=[overlap]),
        op.Constant(value_floats=[threshold]),
    )
    ones_U = op.Expand(op.Constant(value_floats=[1.0]), op.Shape(places_U3, end=1))
    kept = op.ScatterND(op.ConstantOfShape(op.Shape(flat_scores)), places_U3, ones_U)
    return op.Cast(op.Reshape(kept, op.Shape(scores)), to=9)  # bool


def write_onnx(model_file: ModelFile, path: Path) -> Run:
    """Write an ONNX file for any batch size; return the model in onnxruntime.

    The input "images" is float32 (B, 3, S, S) in 0..1; the output is "logits" (B, K), or
    "detections" (B, D, 6) as in ``DeployedDetector``. The metadata contains the ``Facts``.

    Raises:
        ConfigError: ONNX lacks an operator of the model.
    """
    detection = is_detector(model_file.name)
    module: nn.Module = DeployedClassifier(model_file)
    table: dict[Any, Any] = {}
    if detection:
        module = ExportableDetector(model_file, torch.ops.raygkd.suppress)
        table = {torch.ops.raygkd.suppress.default: _onnx_suppress}
    try:
        with quiet():
            program = torch.onnx.export(
                module.eval(),
                (example_images(model_file),),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=[IMAGES],
                output_names=[DETECTIONS if detection else LOGITS],
                opset_version=OPSET,
                custom_translation_table=table,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        operator = _lacking_operator(error)
        if operator is None:
            raise
        raise ConfigError(
            f"--format onnx: has no operator for {operator}, which {short_name(model_file.name)} "
            "uses; choose --format torch"
        ) from error
    assert program is not None
    # this metadata has the source location of each node
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
    program.model.metadata_props.update(facts_of(model_file).to_metadata())
    program.save(path, external_data=False)
    return open_onnx(path)[1]


def _lacking_operator(error: BaseException | None) -> str | None:
    """Return the operator of torch that the exporter could not convert, from its messages."""
    while error is not None:
        found = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", str(error))
        if found:
            return found[1]
        error = error.__cause__
    return None


def quantise(source: Path, path: Path) -> Run:
    """Write an ONNX file with 8-bit weights; return the model in onnxruntime.

    Activations are quantised at run time by the range of each batch (dynamic quantisation).
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet():
        # onnxruntime convolves with unsigned weights on every processor
        quantize_dynamic(source, path, weight_type=QuantType.QUInt8)
    return open_onnx(path)[1]


@FORMATS.register("onnx")
class Onnx(ExportFormat):
    """An ONNX file."""

    suffix = ".onnx"
    packages = ("onnx", "onnxscript", "onnxruntime")
    opset = OPSET
    quantised = ("int8", "dynamic")

    def write(self, model_file: ModelFile, path: Path) -> Run:
        """Call ``write_onnx``."""
        return write_onnx(model_file, path)

    def calibrate(
        self, model_file: ModelFile, source: Path, batches: Iterable[Tensor], folder: Path
    ) -> Calibrated:
        """Return a ``StaticInt8``."""
        return StaticInt8(source, batches, folder, model_file.ranges)

    def quantise(self, source: Path, path: Path) -> Run:
        """Call the function ``quantise``."""
        return quantise(source, path)

    def read(self, path: Path) -> tuple[Facts, Run]:
        """Return the facts of the model, and the model in onnxruntime on the CPU."""
        return open_onnx(path)
