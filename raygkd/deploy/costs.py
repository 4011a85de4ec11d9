"""What a model costs before it is trained: parameters, size, operations and latency.

Shapes: B batch, C channels, H height, W width, S side of the square input.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from raygkd.deploy.modules import student
from raygkd.deploy.onnx_session import onnx_run
from raygkd.metrics.latency import latencies
from raygkd.models import ModelFile
from raygkd.optional_packages import require
from raygkd.storage.temporary import temporary_folder

Name = TypeVar("Name", bound=Hashable)
# the costs that are measured with files for ONNX Runtime
LATENCY, INT8_MB, INT8_LATENCY = "latency", "int8_mb", "int8_latency"
# digits of a measured time that mean something
DIGITS = 3


def student_costs(
    models: Mapping[Name, ModelFile], wanted: Collection[str], *, threads: int
) -> dict[Name, dict[str, float]]:
    """Return name -> costs of each model, whose weights do not matter.

    "params"; "mb", size of the float32 weights in MB; "mflops", million floating-point operations
    for one image, two for a multiplication with its addition; "memory", MB for one image, see
    ``live_bytes``. Where they are wanted: "latency", the median time for one image in ONNX Runtime
    on this machine's CPU, in milliseconds; "int8_mb" and "int8_latency", size of the ONNX file in
    8 bits, and its latency. To be timed, the models take turns.

    Args:
        models: name -> model.
        wanted: names of costs.
        threads: of ONNX Runtime.

    Raises:
        ConfigError: packages that latency or 8 bits need are missing.
    """
    costs = {name: _of_module(model) for name, model in models.items()}
    if {LATENCY, INT8_MB, INT8_LATENCY} & set(wanted):
        for name, of_file in _of_files(models, wanted, threads).items():
            costs[name] |= of_file
    return costs


def _of_module(model_file: ModelFile) -> dict[str, float]:
    module = student(model_file).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(_images(model_file))
    parameters = list(module.parameters())
    held = sum(one.nbytes for one in (*parameters, *module.buffers()))
    return {
        "params": sum(parameter.numel() for parameter in parameters),
        "mb": sum(parameter.nbytes for parameter in parameters) / 1e6,
        "mflops": counter.get_total_flops() / 1e6,
        "memory": (held + live_bytes(module, _images(model_file))) / 1e6,
    }


def live_bytes(module: nn.Module, images_BCHW: Tensor) -> int:
    """Return the largest sum of the bytes that activations take at a time.

    It is counted operation by operation, as torch frees them, and belongs to the model alone. The
    peak of a process does not: it depends on allocator, threads, and copies made while loading.

    Args:
        module: in eval mode.
        images_BCHW: images in 0..1, which count as well.
    """
    with torch.no_grad(), _LiveBytes(module, images_BCHW) as counted:
        module(images_BCHW)
    return counted.most


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations have made and that are still in use.

    Args:
        module: whose weights are not counted.
        given: a tensor that exists before, and is.
    """

    def __init__(self, module: nn.Module, given: Tensor):
        super().__init__()
        self._weights = {
            StorageWeakRef(one.untyped_storage()).cdata
            for one in (*module.parameters(), *module.buffers())
        }
        # address of a storage -> a weak reference to it, and its bytes
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0
        self._count(given)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count its results."""
        result = func(*args, **(kwargs or {}))
        self._alive = {key: one for key, one in self._alive.items() if not one[0].expired()}
        for one in tree_leaves(result):
            if isinstance(one, Tensor):
                self._count(one)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        known = StorageWeakRef(storage)
        if known.cdata not in self._weights:
            self._alive[known.cdata] = known, storage.nbytes()
        self.most = max(self.most, sum(size for _, size in self._alive.values()))


def _of_files(
    models: Mapping[Name, ModelFile], wanted: Collection[str], threads: int
) -> dict[Name, dict[str, float]]:
    """Return the wanted costs of the models' files for ONNX Runtime."""
    require("onnx", "onnxruntime", "onnxscript", of="the latency of a student, or its 8 bits")
    from raygkd.deploy.exporters.onnx import write_onnx
    from raygkd.deploy.exporters.static_int8 import StaticInt8

    costs: dict[Name, dict[str, float]] = {name: {} for name in models}
    with temporary_folder("files") as folder:
        files: list[tuple[Name, str, Path]] = []
        for number, (name, model_file) in enumerate(models.items()):
            full, int8 = folder / f"{number}.onnx", folder / f"{number}-int8.onnx"
            write_onnx(model_file, full)
            files.append((name, LATENCY, full))
            if {INT8_MB, INT8_LATENCY} & set(wanted):
                # neither size nor time depends on the ranges
                StaticInt8(full, [_images(model_file)], folder).write(int8)
                files.append((name, INT8_LATENCY, int8))
                costs[name][INT8_MB] = int8.stat().st_size / 1e6
        timed = [one for one in files if one[1] in wanted]
        subjects = {
            str(number): (onnx_run(path, threads=threads), _images(models[name]))
            for number, (name, _, path) in enumerate(timed)
        }
        found = latencies(subjects, lambda done, total: None)
    for number, (name, cost, _) in enumerate(timed):
        costs[name][cost] = round(found[str(number)].median, DIGITS)
    return costs


def _images(model_file: ModelFile) -> Tensor:
    """Return one grey image (1, 3, S, S) in 0..1."""
    return torch.full((1, 3, *model_file.image_size), 0.5)
