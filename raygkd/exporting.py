"""Models in other formats: ONNX, a ``torch.export`` program, safetensors with a model card.

Shapes: B batch, S side of the square input, K classes, D most detections of an image, N candidates
of a class, U candidates that stay, 4 the sides of a box.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raygkd.build import Deployed, DeployedClassifier
from raygkd.inference import Run, facts_of, on_device, open_onnx, student
from raygkd.models import Detector, ModelFile, is_detector
from raygkd.models.fixed_shapes import FixedShapeDetector, Suppression, suppress

# the oldest that torch's exporter writes without conversion: onnxruntime 1.14 and later read it
OPSET = 18
# format -> suffix of its files, and packages it needs
FORMATS = {
    "onnx": (".onnx", ("onnx", "onnxscript", "onnxruntime")),
    "torch": (".pt2", ()),
    "safetensors": (".safetensors", ("safetensors",)),
}
IMAGES, LOGITS, DETECTIONS = "images", "logits", "detections"
# images of the example that a graph is made from; of one alone it would be for one
EXAMPLE = 2
_INT64_MAX = 2**63 - 1


class ExportableDetector(Deployed):
    """What ``DeployedDetector`` does, in shapes that a graph can hold.

    Args:
        model_file: of the detector.
        suppression: does what ``raygkd.models.fixed_shapes.suppress`` does.
    """

    def __init__(self, model_file: ModelFile, suppression: Suppression = suppress):
        super().__init__(model_file)
        assert isinstance(self.model, Detector)
        self.model = FixedShapeDetector(self.model, model_file.image_size[0], suppression)

    def forward(self, images_BCSS: Tensor) -> Tensor:
        """Return the detections (B, D, 6)."""
        return self.model(self.normalised(images_BCSS))


@torch.library.custom_op("raygkd::suppress", mutates_args=())
def _suppress(boxes: Tensor, scores: Tensor, overlap: float, threshold: float) -> Tensor:
    """Do what ``suppress`` does, as one node of a graph: ONNX has an operator for it."""
    return suppress(boxes, scores, overlap, threshold)


@_suppress.register_fake
def _(boxes: Tensor, scores: Tensor, overlap: float, threshold: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def _onnx_suppress(boxes: Any, scores: Any, overlap: float, threshold: float) -> Any:
    """Return the nodes that stand for ``suppress`` of boxes (B, K, N, 4) and scores (B, K, N)."""
    from onnxscript import opset18 as op

    candidates = op.Shape(scores, start=2)
    all_groups = op.Constant(value_ints=[-1])
    four = op.Constant(value_ints=[4])
    # ONNX shares the boxes of an image among its classes, so that here each class is an image
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
    """Write an ONNX file for any number of images; return it as onnxruntime runs it.

    The input "images" is float32 (B, 3, S, S) in 0..1; the output "logits" (B, K), or "detections"
    (B, D, 6) as of ``DeployedDetector``. The metadata has the ``Facts``.
    """
    detection = is_detector(model_file.name)
    module: nn.Module = DeployedClassifier(model_file)
    table: dict[Any, Any] = {}
    if detection:
        module = ExportableDetector(model_file, torch.ops.raygkd.suppress)
        table = {torch.ops.raygkd.suppress.default: _onnx_suppress}
    with _quiet():
        program = torch.onnx.export(
            module.eval(),
            (_example(model_file),),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=[IMAGES],
            output_names=[DETECTIONS if detection else LOGITS],
            opset_version=OPSET,
            custom_translation_table=table,
            verbose=False,
        )
    assert program is not None
    # where in whose source code a node comes from
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
    program.model.metadata_props.update(facts_of(model_file).to_metadata())
    program.save(path, external_data=False)
    return open_onnx(path)[1]


def write_program(model_file: ModelFile, path: Path) -> Run:
    """Write a ``torch.export`` program for any number of images; return it as it runs.

    Input and output are those of ``write_onnx``. The extra file "raygkd" has the ``Facts``. To run
    a detector's, torchvision must be imported.
    """
    module: nn.Module
    if is_detector(model_file.name):
        module = ExportableDetector(model_file)
    else:
        module = DeployedClassifier(model_file)
    with _quiet(), torch.no_grad():
        program = torch.export.export(
            module.eval(),
            (_example(model_file),),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
        with path.open("wb") as file:
            torch.export.save(program, file, extra_files=facts_of(model_file).to_metadata())
    with path.open("rb") as file:
        written = torch.export.load(file)
    return on_device(written.module(), torch.device("cpu"))


def write_safetensors(model_file: ModelFile, path: Path) -> Run:
    """Write the weights alone; return the model with the weights that are in the file."""
    from safetensors.torch import load_file, save

    weights = {name: tensor.contiguous() for name, tensor in model_file.state_dict.items()}
    path.write_bytes(save(weights, metadata=facts_of(model_file).to_metadata()))
    module = student(model_file)
    module.get_submodule("model").load_state_dict(load_file(path))

    def run(images_BCSS: Tensor) -> Tensor:
        with torch.inference_mode():
            return module(images_BCSS)

    return run


WRITERS = {"onnx": write_onnx, "torch": write_program, "safetensors": write_safetensors}


def quantise(source: Path, path: Path) -> Run:
    """Write an ONNX file with weights of 8 bits; return it as onnxruntime runs it.

    Activations become 8 bits while it runs, by the range that each batch has (dynamic).
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        # onnxruntime convolves with unsigned weights on every processor
        quantize_dynamic(source, path, weight_type=QuantType.QUInt8)
    return open_onnx(path)[1]


def _example(model_file: ModelFile) -> Tensor:
    return torch.rand(
        EXAMPLE, 3, *model_file.image_size, generator=torch.Generator().manual_seed(0)
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back the advice that exporters and quantisers give to those who wrote the model."""
    loggers = [logging.getLogger(name) for name in ("torch", "onnxscript", "onnx_ir", "")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)
