"""``torch.export`` programs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from raygkd.deploy.exporters.formats import ExportFormat
from raygkd.deploy.exporters.tracing import ExportableDetector, example_images, quiet
from raygkd.deploy.facts import facts_of
from raygkd.deploy.modules import DeployedClassifier, Run, on_device
from raygkd.models import ModelFile, is_detector
from raygkd.registry import FORMATS


def write_program(model_file: ModelFile, path: Path) -> Run:
    """Write a ``torch.export`` program for any batch size; return the model as loaded from it.

    Input and output are those of ``write_onnx``. The extra file "raygkd" contains the ``Facts``.
    Import torchvision before running a detector.
    """
    module: nn.Module
    if is_detector(model_file.name):
        module = ExportableDetector(model_file)
    else:
        module = DeployedClassifier(model_file)
    with quiet(), torch.no_grad():
        program = torch.export.export(
            module.eval(),
            (example_images(model_file),),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
        with path.open("wb") as file:
            torch.export.save(program, file, extra_files=facts_of(model_file).to_metadata())
    with path.open("rb") as file:
        written = torch.export.load(file)
    return on_device(written.module(), torch.device("cpu"))


@FORMATS.register("torch")
class TorchProgram(ExportFormat):
    """A torch.export program."""

    suffix = ".pt2"
    unread = "is a torch.export program, which can run arbitrary code when it is loaded"

    def write(self, model_file: ModelFile, path: Path) -> Run:
        """Call ``write_program``."""
        return write_program(model_file, path)
