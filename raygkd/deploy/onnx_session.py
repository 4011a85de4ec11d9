"""ONNX files as models.

Shapes: B batch, S side of the square input.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from raygkd.deploy.facts import Facts
from raygkd.deploy.modules import Run
from raygkd.errors import DataError
from raygkd.optional_packages import require


def open_onnx(path: Path) -> tuple[Facts, Run]:
    """Return the result of ``load_model`` for an ONNX file; the model runs on the CPU."""
    require("onnxruntime", of=str(path))
    import onnxruntime

    if not path.exists():
        raise FileNotFoundError(2, "No such file or directory")
    options = onnxruntime.SessionOptions()
    # one thread pool per process, as large as torch's
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common type below this one
        raise DataError(f"{path} is damaged or not an ONNX model") from error
    facts = Facts.from_metadata(session.get_modelmeta().custom_metadata_map, path)
    [name] = [node.name for node in session.get_inputs()]

    def run(images_BCSS: Tensor) -> Tensor:
        [output] = session.run(None, {name: images_BCSS.cpu().numpy()})
        return torch.from_numpy(output)

    return facts, run
