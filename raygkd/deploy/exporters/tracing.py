"""Helpers of the exporters that trace a model.

Shapes: B batch, S side of the square input, D most detections of an image.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from raygkd.deploy.modules import Deployed
from raygkd.models import Detector, ModelFile
from raygkd.models.fixed_shapes import FixedShapeDetector, Suppression, suppress

IMAGES, LOGITS, DETECTIONS = "images", "logits", "detections"
# batch size of the traced example; with a batch of 1, the exporter would fix the batch size
EXAMPLE = 2


class ExportableDetector(Deployed):
    """``DeployedDetector`` with fixed shapes, so that it can be exported.

    Args:
        model_file: model file of the detector.
        suppression: equivalent of ``raygkd.models.fixed_shapes.suppress``.
    """

    def __init__(self, model_file: ModelFile, suppression: Suppression = suppress):
        super().__init__(model_file)
        assert isinstance(self.model, Detector)
        self.model = FixedShapeDetector(self.model, model_file.image_size[0], suppression)

    def forward(self, images_BCSS: Tensor) -> Tensor:
        """Return the detections (B, D, 6)."""
        return self.model(self.normalised(images_BCSS))


def example_images(model_file: ModelFile) -> Tensor:
    """Return the example images for tracing."""
    return torch.rand(
        EXAMPLE, 3, *model_file.image_size, generator=torch.Generator().manual_seed(0)
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings of exporters and quantisers, which are meant for authors of models."""
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
