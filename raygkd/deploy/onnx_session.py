"""ONNX files as models.

Shapes: B batch, S side of the square input.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raygkd.deploy.facts import Facts
from raygkd.deploy.modules import Run
from raygkd.errors import DataError
from raygkd.optional_packages import require


def open_onnx(path: Path) -> tuple[Facts, Run]:
    """Return the result of ``load_model`` for an ONNX file; the model runs on the CPU."""
    require("onnxruntime", of=str(path))
    if not path.exists():
        raise FileNotFoundError(2, "No such file or directory")
    # one thread pool per process, as large as torch's
    session = open_session(path, threads=torch.get_num_threads())
    return Facts.from_metadata(session.get_modelmeta().custom_metadata_map, path), _run_of(session)


def onnx_run(path: Path, *, threads: int) -> Run:
    """Return an ONNX file as a function of images (B, 3, S, S) on the CPU, with some threads."""
    return _run_of(open_session(path, threads=threads))


def open_session(path: Path, *, threads: int) -> Any:
    """Return onnxruntime's session of a file, on the CPU.

    Unless the processor is known to have VNNI, its sums of products of 8-bit numbers may overflow
    (x86). Slower ones are used then that do not, except in graphs that onnxruntime cannot change so
    (some detectors).

    Raises:
        DataError: it is not an ONNX model.
    """
    exact = {} if _has_vnni() else {"session.x64quantprecision": "1"}
    try:
        return _session(path, threads, exact)
    except Exception:  # its exceptions have no common type below this one
        try:
            return _session(path, threads, {})
        except Exception as error:
            raise DataError(f"{path} is damaged or not an ONNX model") from error


@functools.cache
def _has_vnni() -> bool:
    """Return whether Linux lists the processor's instructions for 8-bit products.

    The sums that do not overflow anywhere take two to three times as long there.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return "avx512_vnni" in flags or "avx_vnni" in flags


def _session(path: Path, threads: int, entries: Mapping[str, str]) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _run_of(session: Any) -> Run:
    [name] = [node.name for node in session.get_inputs()]

    def run(images_BCSS: Tensor) -> Tensor:
        [output] = session.run(None, {name: images_BCSS.cpu().numpy()})
        return torch.from_numpy(output)

    return run
