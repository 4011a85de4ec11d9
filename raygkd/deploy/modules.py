"""Deployed models, as modules whose input is pixels.

Shapes: B batch, H height, W width, S side of the square input, K classes, D most detections of an
image.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from raygkd.models import MOST_DETECTIONS, ModelFile, build_from_file, is_detector


class Deployed(nn.Module):
    """A model with its normalisation, of images (B, 3, H, W) in 0..1.

    Args:
        model_file: of the model.
    """

    def __init__(self, model_file: ModelFile):
        super().__init__()
        self.model = build_from_file(model_file)
        self.mean_1C11: Tensor
        self.std_1C11: Tensor
        self.register_buffer("mean_1C11", torch.tensor(model_file.mean).view(1, -1, 1, 1))
        self.register_buffer("std_1C11", torch.tensor(model_file.std).view(1, -1, 1, 1))

    def normalised(self, images_BCHW: Tensor) -> Tensor:
        """Return images normalised as in training."""
        return (images_BCHW - self.mean_1C11) / self.std_1C11


class DeployedClassifier(Deployed):
    """A classifier with its normalisation: images (B, 3, H, W) in 0..1 to logits (B, K)."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return class scores."""
        return self.model(self.normalised(images_BCHW))


class DeployedDetector(Deployed):
    """A detector with its normalisation: images (B, 3, S, S) in 0..1 to detections (B, D, 6).

    Each of the D rows of an image holds the sides of a box x0, y0, x1, y1 in pixels of the input,
    a score in 0..1 and a label; best first, and -1 throughout where there are fewer.
    """

    def forward(self, images_BCSS: Tensor) -> Tensor:
        """Return the detections, on the CPU."""
        packed_BD6 = torch.full((len(images_BCSS), MOST_DETECTIONS, 6), -1.0)
        for packed_D6, output in zip(packed_BD6, self.model(self.normalised(images_BCSS))):
            columns = [output["scores"][:, None], output["labels"][:, None].float()]
            packed_D6[: len(output["scores"])] = torch.cat([output["boxes"], *columns], dim=1)
        return packed_BD6


# images (B, 3, S, S) in 0..1 -> logits (B, K), or detections (B, D, 6)
Run = Callable[[Tensor], Tensor]


def student(model_file: ModelFile) -> nn.Module:
    """Return a model file's model with its normalisation, in eval mode."""
    build = DeployedDetector if is_detector(model_file.name) else DeployedClassifier
    return build(model_file).eval()


def on_device(module: nn.Module | torch.fx.GraphModule, device: torch.device) -> Run:
    """Return a function that runs a module on a device, with inputs and outputs on the CPU."""

    def run(images_BCSS: Tensor) -> Tensor:
        with torch.inference_mode():
            return module(images_BCSS.to(device)).cpu()

    return run
