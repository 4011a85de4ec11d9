"""Wide residual networks (Zagoruyko and Komodakis, arXiv 1605.07146), 6n+4 layers in three stages.

A pre-activation network activates at the start of a block, so the sum that leaves a stage is not
activated. Where the next stage begins both of its branches read the activated sum; that activation
is held here by the end of the stage it closes. The function and the parameters are the paper's, and
a stage's output is a feature map after its activation.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from raygkd.models.staged import StagedClassifier


def _activation(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


class PreActivationBlock(nn.Module):
    """Two 3x3 convolutions, each activated before, and a shortcut around them.

    Args:
        in_channels: C of the input.
        channels: C of the output; a 1x1 shortcut of the activated input where it changes.
        stride: by which H and W are divided.
        activated: the input has been activated already.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, *, activated: bool):
        super().__init__()
        self.activation = nn.Identity() if activated else _activation(in_channels)
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False),
            _activation(channels),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        )
        self.projection = (
            nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            if in_channels != channels
            else None
        )

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Return the block's output, not activated."""
        activated_BCHW = self.activation(features_BCHW)
        if self.projection is not None:
            features_BCHW = self.projection(activated_BCHW)
        return features_BCHW + self.residual(activated_BCHW)


def wide_resnet(depth: int, widening: int, num_classes: int) -> StagedClassifier:
    """Return a WRN of ``depth`` = 6n+4 layers, ``widening`` times as wide as 16, 32, 64.

    Its stages divide H and W by 1, 2 and 4.
    """
    blocks, rest = divmod(depth - 4, 6)
    if rest or blocks < 1:
        raise ValueError(f"the depth of a wide ResNet is 6n+4, got {depth}")
    widths = (16, 16 * widening, 32 * widening, 64 * widening)
    stages = []
    for number, (in_channels, channels) in enumerate(pairwise(widths)):
        stride = 1 if number == 0 else 2
        stages.append(
            nn.Sequential(
                PreActivationBlock(in_channels, channels, stride, activated=number > 0),
                *(
                    PreActivationBlock(channels, channels, 1, activated=False)
                    for _ in range(blocks - 1)
                ),
                _activation(channels),
            )
        )
    stem = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
    return StagedClassifier(stem, stages, widths[-1], num_classes)
