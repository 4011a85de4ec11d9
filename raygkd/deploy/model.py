"""A model in use, whatever the format of its file.

Shapes: B batch, S side of the square input.
"""

from __future__ import annotations

from pathlib import Path

import torch

from raygkd.deploy.facts import Facts, facts_of
from raygkd.deploy.modules import Run, on_device, student
from raygkd.deploy.onnx_session import open_onnx
from raygkd.errors import DataError
from raygkd.models import load_model_file
from raygkd.storage.atomic_files import Place, local_copy

# suffix of an exported file that is not read again -> what it is
OTHERS = {
    ".safetensors": "holds weights alone",
    ".pt2": "is a torch.export program, which may run anything when it is loaded",
}


def load_model(path: Place) -> tuple[Facts, Run]:
    """Return what is known of a model, and the model on this process's device.

    Args:
        path: of a model file that raygkd wrote, or of an exported .onnx file.

    Raises:
        DataError: there is no such file, or it is neither.
        ConfigError: it needs a package that is not installed.
    """
    suffix = Path(path.name).suffix
    if suffix in OTHERS:
        raise DataError(
            f"{path} {OTHERS[suffix]}: give the model file that it was made of, or an .onnx file"
        )
    if suffix == ".onnx":
        try:
            with local_copy(path) as local:
                return open_onnx(local)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    model_file = load_model_file(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return facts_of(model_file), on_device(student(model_file).to(device), device)
