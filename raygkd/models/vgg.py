"""VGG (arXiv 1409.1556) with batch normalisation, for small images.

As in the student-teacher pairs of CRD (arXiv 1910.10699), it has five stages and a single linear
layer.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from raygkd.models.staged import StagedClassifier

WIDTHS = (64, 128, 256, 512, 512)


class HalvingPool(nn.Module):
    """Max-pool a map to half its size while its shorter side is longer than 4.

    This gives CRD's networks on images of 32 x 32 (maps of 32, 16, 8, 4, 4) and 64 x 64 (64, 32,
    16, 8, 4), and lets images of 8 x 8 pass (8, 4, 4, 4, 4).
    """

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Return (B, C, H/2, W/2), or the map as it is."""
        if min(features_BCHW.shape[2:]) <= 4:
            return features_BCHW
        return F.max_pool2d(features_BCHW, 2)


def vgg(convolutions: Sequence[int], num_classes: int) -> StagedClassifier:
    """Return a VGG with the given number of 3x3 convolutions in each of its five stages."""
    stages: list[nn.Module] = []
    in_channels = 3
    for channels, count in zip(WIDTHS, convolutions, strict=True):
        layers: list[nn.Module] = [HalvingPool()] if stages else []
        for _ in range(count):
            layers += [
                nn.Conv2d(in_channels, channels, 3, padding=1),
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
            ]
            in_channels = channels
        stages.append(nn.Sequential(*layers))
    return StagedClassifier(nn.Identity(), stages, in_channels, num_classes)
