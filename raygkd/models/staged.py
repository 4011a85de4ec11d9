"""The shape all CIFAR classifiers share: stem, stages, global average pooling, one linear layer.

Shapes: B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class StagedClassifier(nn.Module):
    """A convolutional classifier whose levels are its stages.

    Convolutions start from He's normal initialisation over the fan-out (arXiv 1502.01852).

    Args:
        stem: images (B, 3, H, W) to the first stage's input.
        stages: shallow to deep; each one's output is a feature map (B, C, H, W) after its
            activation.
        channels: C of the last stage.
        num_classes: K.

    Attributes:
        stages: dotted paths of the stages, shallow to deep.
    """

    def __init__(
        self, stem: nn.Module, stages: Sequence[nn.Module], channels: int, num_classes: int
    ):
        super().__init__()
        self.stem = stem
        self.stages = tuple(f"stage{number}" for number in range(1, len(stages) + 1))
        for path, stage in zip(self.stages, stages, strict=True):
            self.add_module(path, stage)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return class scores (B, K) of images (B, 3, H, W)."""
        features_BCHW = self.stem(images_BCHW)
        for path in self.stages:
            features_BCHW = getattr(self, path)(features_BCHW)
        return self.classifier(features_BCHW.mean((2, 3)))
