"""Weights as safetensors.

Shapes: B batch, S side of the square input.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from raygkd.deploy.exporters.formats import ExportFormat
from raygkd.deploy.facts import facts_of
from raygkd.deploy.modules import Run, student
from raygkd.models import ModelFile
from raygkd.registry import FORMATS


def write_safetensors(model_file: ModelFile, path: Path) -> Run:
    """Write the weights alone; return the model with the weights from the file."""
    from safetensors.torch import load_file, save

    weights = {name: tensor.contiguous() for name, tensor in model_file.state_dict.items()}
    path.write_bytes(save(weights, metadata=facts_of(model_file).to_metadata()))
    module = student(model_file)
    module.get_submodule("model").load_state_dict(load_file(path))

    def run(images_BCSS: Tensor) -> Tensor:
        with torch.inference_mode():
            return module(images_BCSS)

    return run


@FORMATS.register("safetensors")
class Safetensors(ExportFormat):
    """The weights, with a model card."""

    suffix = ".safetensors"
    packages = ("safetensors",)
    has_card = True
    unread = "contains weights only"

    def write(self, model_file: ModelFile, path: Path) -> Run:
        """Call ``write_safetensors``."""
        return write_safetensors(model_file, path)
