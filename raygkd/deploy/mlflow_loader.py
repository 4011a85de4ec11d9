"""A model file as MLflow's ``pyfunc`` loads it: ``loader_module: raygkd.deployed``.

Shapes: B batch, S side of the square input, D most detections of an image.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from raygkd.deploy.modules import DeployedDetector
from raygkd.models import load_model_file


class Predictor:
    """Detects objects with a model file.

    Args:
        path: of the model file.
    """

    def __init__(self, path: str):
        self._model = DeployedDetector(load_model_file(path)).eval()

    def predict(self, images_BCHW: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return what ``DeployedDetector`` does, (B, D, 6), of images (B, 3, S, S) in 0..1."""
        with torch.no_grad():
            return self._model(torch.from_numpy(np.array(images_BCHW, np.float32))).numpy()


def _load_pyfunc(path: str) -> Predictor:
    """MLflow calls this with the path of the model's data."""
    return Predictor(path)
