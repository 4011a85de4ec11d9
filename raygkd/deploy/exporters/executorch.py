"""ExecuTorch programs for its XNNPACK kernels, which run on phones.

Shapes: B batch, C channels of a layer's output, S side of the square input.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raygkd.deploy.exporters.formats import Calibrated, ExportFormat
from raygkd.deploy.exporters.tracing import quiet
from raygkd.deploy.facts import METADATA, Facts, facts_of
from raygkd.deploy.modules import DeployedClassifier, Run
from raygkd.errors import ConfigError, DataError
from raygkd.models import ModelFile, is_detector
from raygkd.optional_packages import require
from raygkd.registry import FORMATS

EXTRA = "executorch"
LAYERS = (nn.Conv2d, nn.Linear)
# bytes 4 and 5 of each program; the next two are the version of the format
_MARK = b"ET"
_SIGNED, _UNSIGNED = (-127, 127), (0, 255)


def _traced(module: nn.Module, images_1CSS: Tensor) -> Any:
    """Return the ``torch.export`` program of a module for one image."""
    with torch.no_grad():
        return torch.export.export(module, (images_1CSS,))


def _write(program: Any, facts: Facts, path: Path) -> Run:
    """Write the ExecuTorch program of a ``torch.export`` program; return the model from it.

    The method "raygkd" returns the facts.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    with quiet(), torch.no_grad():
        edge = to_edge_transform_and_lower(
            program, partitioner=[XnnpackPartitioner()], constant_methods=facts.to_metadata()
        )
        path.write_bytes(edge.to_executorch().buffer)
    return open_executorch(path)[1]


def open_executorch(path: Path) -> tuple[Facts, Run]:
    """Return the facts of an ExecuTorch program, and the model on the CPU.

    Raises:
        DataError: it is damaged, or was not written by ``raygkd export``.
    """
    require("executorch", of=str(path), extra=EXTRA)
    content = path.read_bytes()
    # ExecuTorch would print lines of its own
    if content[4:6] != _MARK:
        raise DataError(f"{path} is damaged or not an ExecuTorch program")
    with quiet():
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

        # one thread pool per process, as large as torch's
        portable_lib._unsafe_reset_threadpool(torch.get_num_threads())
        try:
            program = Runtime.get().load_program(content)
            metadata = {}
            if METADATA in program.method_names:
                [metadata[METADATA]] = program.load_method(METADATA).execute([])
            method = program.load_method("forward")
        except RuntimeError as error:
            raise DataError(f"{path} is damaged or not an ExecuTorch program") from error

    # which the method reads from
    used = program, content

    def run(images_BCSS: Tensor, used: object = used) -> Tensor:
        # the next image overwrites the output
        outputs = [method.execute([one_1CSS])[0].clone() for one_1CSS in images_BCSS.cpu().split(1)]
        return torch.cat(outputs)

    return Facts.from_metadata(metadata, path), run


class _Int8(Calibrated):
    """A classifier that is calibrated each time it is written, and quantised by torchao.

    Args:
        model_file: of the model.
        batches: calibration images (B, 3, S, S) in 0..1, which can be read again.
    """

    def __init__(self, model_file: ModelFile, batches: Iterable[Tensor]):
        self._module, self._facts = DeployedClassifier(model_file).eval(), facts_of(model_file)
        self._example_1CSS, self._batches = _example(model_file), batches
        modules = self._module.model.named_modules()
        self.layers = tuple(name for name, module in modules if isinstance(module, LAYERS))
        if not self.layers:
            raise ConfigError("--quantize int8: the model has no Conv2d and no Linear; omit it")

    def write(self, path: Path, float_layers: Collection[str] = ()) -> Run:
        """Write the quantised program; see ``Calibrated.write``."""
        if set(float_layers) == set(self.layers):
            with quiet():
                program = _traced(self._module, self._example_1CSS)
            return _write(program, self._facts, path)
        with quiet():
            from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
            from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

            # what is between layers is quantised if any of them is
            in_float = {f"model.{name}" for name in float_layers}
            scheme = xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True)
            quantiser = xnnpack_quantizer.XNNPACKQuantizer().set_global(scheme)
            quantiser.set_filter_function(lambda node: in_float.isdisjoint(_modules_of(node)))
            # for batches of any size, which calibration has
            example_BCSS = self._example_1CSS.repeat(2, 1, 1, 1)
            with torch.no_grad():
                traced = torch.export.export(
                    self._module,
                    (example_BCSS,),
                    dynamic_shapes=({0: torch.export.Dim("batch")},),
                )
                observed = prepare_pt2e(traced.module(), quantiser)
                for images_BCSS in self._batches:
                    observed(images_BCSS)
                program = _traced(convert_pt2e(observed), self._example_1CSS)
        return _write(program, self._facts, path)

    def errors(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """Return the error of each layer; see ``Calibrated.errors``.

        Its input, weights and output are rounded with the ranges that they have in these images.
        """
        # layer -> sums of the squared errors and of the squares of its channels
        sums: dict[str, list[Any]] = defaultdict(lambda: [0.0, 0.0])

        def hook(name: str) -> Any:
            def add(module: Any, given: tuple[Tensor], output: Tensor) -> None:
                rounded = _rounded_layer(module, given[0])
                # features of a Linear are last
                axes = tuple(range(output.ndim - 1))
                if isinstance(module, nn.Conv2d):
                    axes = (0, 2, 3)
                sums[name][0] += (rounded - output).square().sum(axes)
                sums[name][1] += output.square().sum(axes)

            return add

        named = dict(self._module.model.named_modules())
        handles = [named[name].register_forward_hook(hook(name)) for name in self.layers]
        with torch.no_grad():
            for images_BCSS in batches:
                self._module(images_BCSS)
        for handle in handles:
            handle.remove()
        # a layer that the model does not call has no error
        return {name: _relative(*sums[name]) if name in sums else 0.0 for name in self.layers}


def _example(model_file: ModelFile) -> Tensor:
    """Return one image (1, 3, S, S)."""
    side = model_file.image_size
    return torch.rand(1, 3, *side, generator=torch.Generator().manual_seed(0))


def _modules_of(node: Any) -> set[str]:
    """Return the paths of the modules that a node of a traced graph belongs to."""
    stack: Mapping[str, tuple[str, Any]] = node.meta.get("nn_module_stack", {})
    return {path for path, _ in stack.values()}


def _rounded_layer(module: Any, given: Tensor) -> Tensor:
    """Return the output of a Conv2d or Linear in 8 bits."""
    weight = module.weight
    scale_C = weight.flatten(1).abs().amax(1).clamp_min(1e-12) / _SIGNED[1]
    zero_C = torch.zeros(len(scale_C), dtype=torch.int32)
    small = torch.fake_quantize_per_channel_affine(weight, scale_C, zero_C, 0, *_SIGNED)
    rounded = _rounded(given)
    if isinstance(module, nn.Conv2d):
        return _rounded(module._conv_forward(rounded, small, module.bias))
    return _rounded(nn.functional.linear(rounded, small, module.bias))


def _rounded(values: Tensor) -> Tensor:
    """Return values rounded to 8 bits between the smallest and the largest."""
    low, high = min(values.min().item(), 0.0), max(values.max().item(), 0.0)
    scale = max(high - low, 1e-12) / _UNSIGNED[1]
    zero = round(-low / scale)
    return torch.fake_quantize_per_tensor_affine(values, scale, zero, *_UNSIGNED)


def _relative(error_C: Tensor, size_C: Tensor) -> float:
    """Return the mean relative error of the channels that are not zero, at most 1 for each."""
    used_C = size_C > 0
    if not used_C.any():
        return 0.0
    error = (error_C[used_C] / size_C[used_C]).clamp_max(1).sqrt().mean().item()
    return error if math.isfinite(error) else 1.0


@FORMATS.register("executorch")
class ExecuTorch(ExportFormat):
    """An ExecuTorch program with XNNPACK, of one image at a time, for phones; classifiers only."""

    suffix = ".pte"
    extra = EXTRA
    packages = ("executorch",)
    quantised = ("int8",)

    def write(self, model_file: ModelFile, path: Path) -> Run:
        """Write the program of a classifier.

        Raises:
            ConfigError: it is a detector.
        """
        if is_detector(model_file.name):
            raise ConfigError(
                "--format executorch: cannot write detectors, whose number of boxes is not known "
                "before they run; choose --format onnx or openvino"
            )
        with quiet():
            program = _traced(DeployedClassifier(model_file).eval(), _example(model_file))
        return _write(program, facts_of(model_file), path)

    def calibrate(
        self, model_file: ModelFile, source: Path, batches: Iterable[Tensor], folder: Path
    ) -> Calibrated:
        """Prepare a classifier for quantisation.

        Raises:
            ConfigError: it was trained in 8 bits, with ranges of an ONNX graph.
        """
        if model_file.ranges:
            raise ConfigError(
                "--quantize int8: --format executorch cannot use the ranges of a student trained "
                "in 8 bits; choose --format onnx or openvino"
            )
        return _Int8(model_file, batches)

    def read(self, path: Path) -> tuple[Facts, Run]:
        """Call ``open_executorch``."""
        return open_executorch(path)
