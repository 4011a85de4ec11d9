"""Static quantisation of an ONNX file: 8-bit weights, and activations with fixed ranges.

Shapes: B batch, C channels of a layer's output, S side of the square input.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from raygkd.deploy.exporters.formats import Calibrated
from raygkd.deploy.exporters.int8_graph import (
    BETWEEN,
    LAYERS,
    layer_names,
    look_up_hard_sigmoids,
    nodes_in_8_bits,
    prepare,
    with_layer_errors,
)
from raygkd.deploy.exporters.tracing import IMAGES, quiet
from raygkd.deploy.modules import Run
from raygkd.deploy.onnx_session import open_onnx, open_session
from raygkd.errors import ConfigError


class _Reader:
    """Batches as onnxruntime's calibration reads them."""

    def __init__(self, batches: Iterable[Tensor]):
        self._batches: Iterator[Tensor] = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        """Return the next batch."""
        images_BCSS = next(self._batches, None)
        return None if images_BCSS is None else {IMAGES: images_BCSS.numpy()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.get_next, None)


class StaticInt8(Calibrated):
    """An ONNX model with the ranges of its activations.

    Weights are signed, with a scale per output channel; activations are unsigned, between the
    smallest and the largest value of the calibration images. Batch normalisation is folded.

    Args:
        source: the ONNX file.
        batches: calibration images (B, 3, S, S) in 0..1.
        folder: for temporary files; must exist as long as this object.
        ranges: of a model that was trained with them (``ModelFile.ranges``), which is not
            calibrated; empty for others.

    Attributes:
        prepared: the float file whose nodes are quantised.
        ranges: tensor of it -> its smallest and its largest value.

    Raises:
        ConfigError: the model has no layer that can be quantised.
    """

    def __init__(
        self,
        source: Path,
        batches: Iterable[Tensor],
        folder: Path,
        ranges: Mapping[str, tuple[float, float]] = {},
    ):
        import onnx

        self._source, self._folder = source, folder
        self.prepared = folder / "prepared.onnx"
        with quiet():
            prepare(source, self.prepared)
        self._names = layer_names(onnx.load(self.prepared).graph)
        self.layers = tuple(self._names.values())
        if not self.layers:
            raise ConfigError(
                f"--quantize int8: the model has no {', '.join(LAYERS)} with fixed weights; omit it"
            )
        self.ranges = dict(ranges) or self._calibrated(batches)

    def _calibrated(self, batches: Iterable[Tensor]) -> dict[str, tuple[float, float]]:
        """Return the ranges of all tensors on some images."""
        from onnxruntime.quantization import create_calibrator

        with quiet():
            calibrator = create_calibrator(
                self.prepared,
                [*LAYERS, *BETWEEN],
                augmented_model_path=str(self._folder / "calibration.onnx"),
            )
            calibrator.collect_data(_Reader(batches))
            found = calibrator.compute_data()
        pairs = {name: data.range_value for name, data in found.items()}
        return {name: (low.item(), high.item()) for name, (low, high) in pairs.items()}

    def write(self, path: Path, float_layers: Collection[str] = ()) -> Run:
        """Write the quantised file; see ``Calibrated.write``."""
        import onnx

        model = self._quantised(float_layers)
        if model is None:
            shutil.copyfile(self._source, path)
        else:
            look_up_hard_sigmoids(model.graph)
            onnx.save(model, path)
        return open_onnx(path)[1]

    def with_float_weights(self) -> Any:
        """Return the quantised model with QuantizeLinear nodes for its weights, too.

        Weights and biases stay in float, and nodes are in the order in which they run.
        """
        model = self._quantised((), AddQDQPairToWeight=True, QuantizeBias=False)
        look_up_hard_sigmoids(model.graph)
        return model

    def _quantised(self, float_layers: Collection[str], **options: bool) -> Any:
        """Return the quantised model before look-ups; None if no node is quantised."""
        import onnx
        from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType
        from onnxruntime.quantization.calibrate import TensorsData

        model = onnx.load(self.prepared)
        nodes = nodes_in_8_bits(model.graph, float_layers)
        # the quantiser takes an empty list for all
        if not nodes:
            return None
        ranges = {
            name: (np.float32(low), np.float32(high)) for name, (low, high) in self.ranges.items()
        }
        with quiet():
            quantiser = QDQQuantizer(
                model,
                per_channel=True,
                reduce_range=False,
                weight_qType=QuantType.QInt8,
                activation_qType=QuantType.QUInt8,
                tensors_range=TensorsData(CalibrationMethod.MinMax, ranges),
                nodes_to_quantize=nodes,
                nodes_to_exclude=[],
                op_types_to_quantize=[*LAYERS, *BETWEEN],
                # what follows a matrix product stays in float
                extra_options={
                    "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"],
                    **options,
                },
            )
            quantiser.quantize_model()
            quantiser.model.topological_sort()
        return quantiser.model.model

    def errors(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """Return the error of each layer; see ``Calibrated.errors``."""
        import onnx

        full, quantised = onnx.load(self.prepared), self._quantised(())
        path = self._folder / "errors.onnx"
        onnx.save(with_layer_errors(full, quantised, self._names), path)
        session = open_session(path, threads=1)
        totals: list[Any] = [0.0] * (2 * len(self._names))
        for images_BCSS in batches:
            sums = session.run(None, {IMAGES: images_BCSS.numpy()})
            totals = [total + one for total, one in zip(totals, sums, strict=True)]
        return {
            layer: _relative(error_C, size_C)
            for layer, error_C, size_C in zip(self.layers, totals[::2], totals[1::2], strict=True)
        }


def _relative(error_C: NDArray[np.float32], size_C: NDArray[np.float32]) -> float:
    """Return the mean relative error of the channels that are not zero, at most 1 for each.

    In the error of all channels together, one with large values would hide those that are lost.
    """
    used_C = size_C > 0
    if not used_C.any():
        return 0.0
    return float(np.sqrt(np.minimum(error_C[used_C] / size_C[used_C], 1)).mean())
