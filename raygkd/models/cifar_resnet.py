"""ResNets for small images (He et al., arXiv 1512.03385, section 4.2), 6n+2 layers in three stages.

As in the student-teacher pairs of CRD (arXiv 1910.10699), a shortcut whose shape changes is a 1x1
convolution with batch normalisation (the paper's option B), and the 8x4 and 32x4 networks have
widths 32, 64, 128, 256.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from torch import Tensor, nn

from raygkd.models.staged import StagedClassifier


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them, activated after their sum."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False),
                nn.BatchNorm2d(channels),
            )
        self.activation = nn.ReLU(inplace=True)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Return the block's output; H and W are divided by its stride."""
        return self.activation(self.residual(features_BCHW) + self.shortcut(features_BCHW))


def cifar_resnet(
    depth: int, widths: tuple[int, int, int, int], num_classes: int
) -> StagedClassifier:
    """Return a ResNet of ``depth`` = 6n+2 layers; ``widths`` are those of stem and stages.

    Its stages divide H and W by 1, 2 and 4.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"the depth of a CIFAR ResNet is 6n+2, got {depth}")
    stem = nn.Sequential(
        nn.Conv2d(3, widths[0], 3, padding=1, bias=False),
        nn.BatchNorm2d(widths[0]),
        nn.ReLU(inplace=True),
    )
    stages = [
        nn.Sequential(
            BasicBlock(in_channels, channels, stride),
            *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)),
        )
        for in_channels, channels, stride in zip(widths, widths[1:], (1, 2, 2))
    ]
    return StagedClassifier(stem, stages, widths[-1], num_classes)
