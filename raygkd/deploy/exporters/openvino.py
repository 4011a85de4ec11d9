"""OpenVINO models, made from ONNX files.

Shapes: B batch, S side of the square input.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raygkd.deploy.exporters.formats import Calibrated, ExportFormat
from raygkd.deploy.exporters.onnx import write_onnx
from raygkd.deploy.exporters.static_int8 import StaticInt8
from raygkd.deploy.facts import METADATA, Facts, facts_of
from raygkd.deploy.modules import Run
from raygkd.errors import DataError
from raygkd.models import ModelFile
from raygkd.optional_packages import require
from raygkd.registry import FORMATS
from raygkd.storage.temporary import temporary_folder

EXTRA = "openvino"
# suffix of the weights, which OpenVINO looks for beside the graph
WEIGHTS = ".bin"


def convert(source: Path, path: Path, facts: Facts) -> Run:
    """Write an OpenVINO model with the graph of an ONNX file; return it in OpenVINO.

    Args:
        source: the ONNX file, float or with QuantizeLinear nodes.
        path: the file of the graph; the weights are written beside it.
        facts: of the model.
    """
    import openvino

    model = openvino.Core().read_model(source)
    # the ONNX file's metadata, under another name
    del model.rt_info["framework"]
    for name, text in facts.to_metadata().items():
        model.set_rt_info(text, [name])
    openvino.save_model(model, path, compress_to_fp16=False)
    return open_openvino(path)[1]


def open_openvino(path: Path) -> tuple[Facts, Run]:
    """Return the facts of an OpenVINO model, and the model on the CPU.

    Raises:
        DataError: it is damaged, or was not written by ``raygkd export``.
    """
    require("openvino", of=str(path), extra=EXTRA)
    import openvino

    content, weights = path.read_bytes(), path.with_suffix(WEIGHTS).read_bytes()
    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        # some processors would multiply in 16 bits
        "INFERENCE_PRECISION_HINT": "f32",
    }
    try:
        model = core.read_model(content, weights)
        compiled = core.compile_model(model, "CPU", settings)
    except RuntimeError as error:
        raise DataError(
            f"{path} is damaged or not an OpenVINO model, or does not belong to "
            f"{path.with_suffix(WEIGHTS).name}"
        ) from error
    metadata = {}
    if model.has_rt_info([METADATA]):
        metadata[METADATA] = model.get_rt_info([METADATA]).astype(str)
    return Facts.from_metadata(metadata, path), _run_of(compiled)


def _run_of(compiled: Any) -> Run:
    def run(images_BCSS: Tensor) -> Tensor:
        [output] = compiled(images_BCSS.cpu().numpy()).values()
        return torch.from_numpy(output)

    return run


class _Int8(Calibrated):
    """A quantised ONNX file, written as an OpenVINO model."""

    def __init__(self, static: StaticInt8, folder: Path, facts: Facts):
        self.layers = static.layers
        self._static, self._facts = static, facts
        self._file = folder / "int8.onnx"

    def write(self, path: Path, float_layers: Collection[str] = ()) -> Run:
        """Write the quantised model; see ``Calibrated.write``."""
        self._static.write(self._file, float_layers)
        return convert(self._file, path, self._facts)

    def errors(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """Return the error of each layer in the ONNX file; see ``Calibrated.errors``."""
        return self._static.errors(batches)


@FORMATS.register("openvino")
class OpenVino(ExportFormat):
    """An OpenVINO model, with its weights beside it in a .bin file."""

    suffix = ".xml"
    beside = (WEIGHTS,)
    extra = EXTRA
    packages = ("onnx", "onnxscript", "onnxruntime", "openvino")
    quantised = ("int8",)

    def write(self, model_file: ModelFile, path: Path) -> Run:
        """Convert the ONNX file of a model."""
        with temporary_folder("files") as folder:
            write_onnx(model_file, folder / "model.onnx")
            return convert(folder / "model.onnx", path, facts_of(model_file))

    def calibrate(
        self, model_file: ModelFile, source: Path, batches: Iterable[Tensor], folder: Path
    ) -> Calibrated:
        """Calibrate the ONNX file of a model."""
        write_onnx(model_file, folder / "model.onnx")
        static = StaticInt8(folder / "model.onnx", batches, folder, model_file.ranges)
        return _Int8(static, folder, facts_of(model_file))

    def read(self, path: Path) -> tuple[Facts, Run]:
        """Call ``open_openvino``."""
        return open_openvino(path)
