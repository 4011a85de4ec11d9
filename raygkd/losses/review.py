"""Knowledge review: each level of the teacher is compared with all deeper levels of the student.

Shape letters: B batch, C channels, H height, W width, M channels of the fused maps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raygkd.graph import full_precision, require, shape_problem
from raygkd.losses.adapters import statistics_problem
from raygkd.losses.base import MapLoss, Setup
from raygkd.losses.levels import without_gradient
from raygkd.registry import METHODS

# sides of the grids to which maps are pooled, each with half the weight of the one before
GRIDS = (4, 2, 1)
# most channels of the fused maps
WIDEST = 512


@full_precision
def hcl_loss(student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    """Return the hierarchical context loss: mean squared differences at several resolutions.

    They are taken of the maps themselves, weight 1, and of the maps average-pooled to grids of 4, 2
    and 1, as far as those are below the height, with weights 1/2, 1/4 and 1/8 in this order; the
    sum is divided by the sum of the weights used.

    Args:
        student_BCHW: feature maps (B, C, H, W), already of the teacher's shape.
        teacher_BCHW: feature maps (B, C, H, W); they get no gradient.

    Returns:
        A scalar in squared units of the features.

    Raises:
        ConfigError: the shapes differ.

    Source: Chen et al., arXiv 2104.09044.
    """
    require(shape_problem("feature maps", student_BCHW, teacher_BCHW))
    teacher_BCHW = without_gradient(teacher_BCHW)
    loss, weight, total = F.mse_loss(student_BCHW, teacher_BCHW), 1.0, 1.0
    for side in GRIDS:
        if side < teacher_BCHW.shape[2]:
            weight /= 2
            total += weight
            student, teacher = (
                F.adaptive_avg_pool2d(maps, side) for maps in (student_BCHW, teacher_BCHW)
            )
            loss = loss + weight * F.mse_loss(student, teacher)
    return loss / total


class Fusion(nn.Module):
    """Fuses a level of the student with the deeper levels (attention-based fusion).

    A 1x1 convolution brings the level to M channels. Two weights per position, each a sigmoid of a
    1x1 convolution of both maps, mix it with the deeper map. A 3x3 convolution brings the result to
    the teacher's channels. Batch normalisation follows the first and the last convolution, which
    have no bias; the one of the weights has a bias.

    Args:
        channels: C of the student's level.
        fused: M.
        teacher_channels: C of the teacher's level.
        is_deepest: there is no deeper map.
    """

    def __init__(self, channels: int, fused: int, teacher_channels: int, *, is_deepest: bool):
        super().__init__()
        narrow = nn.Conv2d(channels, fused, kernel_size=1, bias=False)
        widen = nn.Conv2d(fused, teacher_channels, kernel_size=3, padding=1, bias=False)
        for convolution in (narrow, widen):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        self.narrow = nn.Sequential(narrow, nn.BatchNorm2d(fused))
        self.widen = nn.Sequential(widen, nn.BatchNorm2d(teacher_channels))
        self.attention = None
        if not is_deepest:
            self.attention = nn.Sequential(nn.Conv2d(2 * fused, 2, kernel_size=1), nn.Sigmoid())

    def forward(
        self, maps_BCHW: Tensor, deeper_BMHW: Tensor | None, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Return maps with the teacher's channels, and the fused ones for the level before.

        Args:
            maps_BCHW: the student's.
            deeper_BMHW: fused maps of the next deeper level; None for the deepest.
            grid: H and W of the teacher's maps, to which the results are brought.
        """
        batch, _, height, width = maps_BCHW.shape
        if self.training:
            require(statistics_problem(batch * min(height * width, grid[0] * grid[1])))
        fused_BMHW = self.narrow(maps_BCHW)
        if self.attention is not None:
            assert deeper_BMHW is not None
            deeper_BMHW = F.interpolate(deeper_BMHW, (height, width))
            weights_B2HW = self.attention(torch.cat([fused_BMHW, deeper_BMHW], 1))
            fused_BMHW = fused_BMHW * weights_B2HW[:, :1] + deeper_BMHW * weights_B2HW[:, 1:]
        fused_BMHW = F.interpolate(fused_BMHW, grid)
        return self.widen(fused_BMHW), fused_BMHW


@METHODS.register("reviewkd")
class ReviewKD(MapLoss):
    """Each level of the teacher against a fusion of the student's deeper ones, see ``hcl_loss``.

    As in the authors' code, the means of the deepest maps over their positions form one more level,
    the deepest. The authors' code takes a CIFAR teacher's maps before the last ReLU of a stage;
    this class takes the maps that all methods take.

    Args:
        setup: what it is built for; it needs the shapes.

    Raises:
        ConfigError: the shapes are missing.
    """

    weight = 1.0
    ramp: ClassVar[float] = 20 / 240
    source = "Chen et al., CVPR 2021, arXiv 2104.09044; constants of its repository"

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.require_shapes("each level has a fusion of its own")
        levels = sorted(self._levels(self.student_shapes))
        channels = [
            (self.student_shapes[level][0], self.teacher_shapes[level][0]) for level in levels
        ]
        # the pooled level
        channels.append(channels[-1])
        fused = min(WIDEST, channels[-1][0])
        self.fusions = nn.ModuleList(
            Fusion(student, fused, teacher, is_deepest=depth == len(levels))
            for depth, (student, teacher) in enumerate(channels)
        )

    def loss(
        self,
        student_features: Mapping[int, Tensor],
        teacher_features: Mapping[int, Tensor],
    ) -> Tensor:
        """Return the sum of ``hcl_loss`` over the levels; see ``checked_levels`` for errors."""
        levels = sorted(self.checked_levels(student_features, teacher_features))
        maps: list[Tensor] = []
        for features in (student_features, teacher_features):
            maps += [features[level] for level in levels]
        return self._reviewed(*maps)

    @full_precision
    def _reviewed(self, *maps: Tensor) -> Tensor:
        """Return the sum, given the student's maps from shallow to deep, then the teacher's."""
        count = len(maps) // 2
        pairs = [(maps[depth], without_gradient(maps[count + depth])) for depth in range(count)]
        deepest = [side_BCHW.mean((2, 3), keepdim=True) for side_BCHW in pairs[-1]]
        pairs.append((deepest[0], deepest[1]))
        fused, terms = None, []
        for depth, (student_BCHW, teacher_BCHW) in reversed([*enumerate(pairs)]):
            grid = teacher_BCHW.shape[2], teacher_BCHW.shape[3]
            student_BCHW, fused = self.fusions[depth](student_BCHW, fused, grid)
            terms.append(hcl_loss(student_BCHW, teacher_BCHW))
        return torch.stack(terms).sum()
