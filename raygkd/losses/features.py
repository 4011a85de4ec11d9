"""Distillation of a classifier's feature maps: FitNet, AT, VID and ICKD.

Shape letters: B batch, C channels, H height, W width, N = H * W positions.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raygkd.errors import ConfigError
from raygkd.graph import full_precision, normalised_channels, require, shape_problem
from raygkd.losses.adapters import statistics_problem
from raygkd.losses.base import AlignedLoss, FeatureLoss, Setup
from raygkd.losses.levels import on_one_grid, without_gradient
from raygkd.registry import METHODS, option


@full_precision
def hint_loss(student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    """Return the mean squared difference of two maps.

    Args:
        student_BCHW: feature maps (B, C, H, W), already of the teacher's shape.
        teacher_BCHW: feature maps (B, C, H, W); they get no gradient.

    Returns:
        A scalar in squared units of the features.

    Raises:
        ConfigError: the shapes differ.

    Source: Romero et al., arXiv 1412.6550.
    """
    require(shape_problem("feature maps", student_BCHW, teacher_BCHW))
    return F.mse_loss(student_BCHW, without_gradient(teacher_BCHW))


@full_precision
def ickd_loss(student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    """Return ``sum_ij (g_t,ij - g_s,ij)^2 / C``, averaged over samples.

    ``g_i`` is row i, divided by its Euclidean norm, of the matrix (C, C) of inner products between
    the channels' maps. The maps themselves are not normalised. The row of a channel whose map is
    zero is zero and has no gradient.

    Args:
        student_BCHW: feature maps (B, C, H, W), already of the teacher's channels.
        teacher_BCHW: feature maps (B, C, H, W); they get no gradient.

    Returns:
        A scalar without unit, from 0 to 4.

    Raises:
        ConfigError: the shapes differ.

    Source: Liu et al., "Exploring Inter-Channel Correlation for Diversity-preserved Knowledge
    Distillation", ICCV 2021 (ICKD-C).
    """
    require(shape_problem("feature maps", student_BCHW, teacher_BCHW))
    difference_BCC = _correlations(teacher_BCHW.detach()) - _correlations(student_BCHW)
    return difference_BCC.square().sum(2).mean()


def _correlations(features_BCHW: Tensor) -> Tensor:
    """Return the normalised rows (B, C, C) of inner products between each sample's channels."""
    maps_BCN = features_BCHW.flatten(2)
    return normalised_channels((maps_BCN @ maps_BCN.mT)[..., None])


@full_precision
def at_loss(student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    """Return the mean squared difference of two attention maps, over positions and samples.

    A sample's attention map is the mean over channels of the squared features, divided by its
    Euclidean norm; if all features are zero, it is zero.

    Args:
        student_BCHW: feature maps (B, C_s, H, W).
        teacher_BCHW: feature maps (B, C_t, H, W); they get no gradient.

    Returns:
        A scalar without unit.

    Raises:
        ConfigError: B, H or W differ.

    Source: Zagoruyko and Komodakis, arXiv 1612.03928; the paper uses the norm of the difference,
    its code the mean of the squares, as here.
    """
    require(shape_problem("attention maps", student_BCHW[:, 0], teacher_BCHW[:, 0]))
    return F.mse_loss(_attention(student_BCHW), _attention(teacher_BCHW.detach()))


def _attention(features_BCHW: Tensor) -> Tensor:
    """Return the attention maps (B, N), of unit length."""
    return F.normalize(features_BCHW.square().mean(1).flatten(1))


@full_precision
def vid_loss(mean_BCHW: Tensor, variance_1C11: Tensor, teacher_BCHW: Tensor) -> Tensor:
    """Return ``mean ((mu - t)^2 / v + log v) / 2`` over all entries.

    It is the negative log likelihood of the teacher's maps t under normal distributions, up to a
    constant.

    Args:
        mean_BCHW: mu, the maps predicted from the student (B, C, H, W).
        variance_1C11: v > 0 of each channel (1, C, 1, 1), in squared units of the features.
        teacher_BCHW: feature maps (B, C, H, W); they get no gradient.

    Returns:
        A scalar in nats.

    Raises:
        ConfigError: the shapes of the maps differ.

    Source: Ahn et al., arXiv 1904.05835.
    """
    require(shape_problem("feature maps", mean_BCHW, teacher_BCHW))
    error_BCHW = (mean_BCHW - teacher_BCHW.detach()).square()
    return (error_BCHW / variance_1C11 + variance_1C11.log()).mean() / 2


class NormalisedConvolution(nn.Sequential):
    """A 1x1 convolution without bias, which would cancel in the batch normalisation after it."""

    def __init__(self, student_channels: int, teacher_channels: int):
        super().__init__(
            nn.Conv2d(student_channels, teacher_channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(teacher_channels),
        )

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Return (B, C_t, H, W); ConfigError if training on one position of one image."""
        batch, _, height, width = features_BCHW.shape
        if self.training:
            require(statistics_problem(batch * height * width))
        return super().forward(features_BCHW)


@METHODS.register("fitnet")
class FitNet(AlignedLoss):
    """Hints: a regressor predicts the teacher's map from the student's, see ``hint_loss``.

    The regressor is the one that RepDistiller uses for maps of equal size: a 1x1 convolution, batch
    normalisation and ReLU. Maps of different sizes are first pooled to the coarser grid, whereas
    RepDistiller uses a strided convolution.
    """

    weight = 100.0
    levels = "middle"
    source = "Romero et al., ICLR 2015, arXiv 1412.6550"

    def adapter(self, student_channels: int, teacher_channels: int) -> nn.Module:
        """Return convolution, batch normalisation and ReLU."""
        return nn.Sequential(NormalisedConvolution(student_channels, teacher_channels), nn.ReLU())

    def level_loss(self, level: int, student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
        """Return ``hint_loss``."""
        return hint_loss(*self.aligned(level, student_BCHW, teacher_BCHW))


@METHODS.register("ickd")
class ICKD(AlignedLoss):
    """Correlations between channels after a ``NormalisedConvolution``, see ``ickd_loss``."""

    weight = 2.5
    levels = "last"
    source = "Liu et al., ICCV 2021 (ICKD-C); constants of its repository"

    def adapter(self, student_channels: int, teacher_channels: int) -> nn.Module:
        """Return convolution and batch normalisation."""
        return NormalisedConvolution(student_channels, teacher_channels)

    def level_loss(self, level: int, student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
        """Return ``ickd_loss``."""
        return ickd_loss(*self.aligned(level, student_BCHW, teacher_BCHW))


@METHODS.register("at")
class AT(FeatureLoss):
    """Attention transfer: the spatial distribution of squared activations, see ``at_loss``."""

    weight = 1000.0
    source = "Zagoruyko and Komodakis, ICLR 2017, arXiv 1612.03928"

    def level_loss(self, level: int, student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
        """Return ``at_loss`` on the coarser grid."""
        return at_loss(*on_one_grid(student_BCHW, teacher_BCHW))


class VariationalRegressor(nn.Module):
    """Predicts the teacher's maps from the student's: a mean per entry, a variance per channel.

    The mean comes from three 1x1 convolutions without bias, with ReLU in between; the variance is
    the softplus of a learned parameter.

    Args:
        student_channels: number of input channels.
        teacher_channels: number of output channels.
        variance: initial variance of every channel, above the floor.
        floor: added to the softplus, so that the variance stays above 0.

    Source: Ahn et al., arXiv 1904.05835.
    """

    def __init__(
        self, student_channels: int, teacher_channels: int, *, variance: float, floor: float
    ):
        super().__init__()
        widths = (student_channels, *[teacher_channels] * 3)
        convolutions = [
            nn.Conv2d(before, after, kernel_size=1, bias=False)
            for before, after in itertools.pairwise(widths)
        ]
        first, second, third = convolutions
        self.regressor = nn.Sequential(
            first, nn.ReLU(inplace=True), second, nn.ReLU(inplace=True), third
        )
        # the inverse of the softplus, in a form that does not overflow
        target = variance - floor
        initial = target + math.log(-math.expm1(-target))
        self.soft_plus_param = nn.Parameter(torch.full((teacher_channels,), initial))
        self.floor = floor

    def forward(self, features_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean (B, C_t, H, W) and the variance (1, C_t, 1, 1)."""
        variance_C = F.softplus(self.soft_plus_param) + self.floor
        return self.regressor(features_BCHW), variance_C[None, :, None, None]


@METHODS.register("vid")
class VID(FeatureLoss):
    """Variational information: a ``VariationalRegressor`` per level, see ``vid_loss``.

    Args:
        setup: what it is built for; it needs the shapes.
        variance: initial variance of every channel.
        floor: added to the variance, so that it stays above 0.

    Raises:
        ConfigError: the shapes are missing, or the variance is not above the floor.
    """

    weight = 1.0
    source = "Ahn et al., CVPR 2019, arXiv 1904.05835"

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        """Settings of the loss."""

        variance: float = option(5.0, "initial variance of each channel", above=0.0)
        floor: float = option(1e-5, "minimum variance, below the initial one", above=0.0)

    def __init__(self, setup: Setup, *, variance: float, floor: float):
        super().__init__(setup)
        self.require_shapes("each level has a regressor of its own")
        if not 0 < floor < variance < math.inf:
            raise ConfigError(
                f"{self.name}: variance must be above floor, and floor above 0, both finite;"
                f" got {variance} and {floor}"
            )
        self.regressors = nn.ModuleDict(
            {
                str(level): VariationalRegressor(
                    self.student_shapes[level][0],
                    self.teacher_shapes[level][0],
                    variance=variance,
                    floor=floor,
                )
                for level in self._levels(self.student_shapes)
            }
        )

    def level_loss(self, level: int, student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
        """Return ``vid_loss`` on the coarser grid."""
        student_BCHW, teacher_BCHW = on_one_grid(student_BCHW, teacher_BCHW)
        mean_BCHW, variance_1C11 = self.regressors[str(level)](student_BCHW)
        return vid_loss(mean_BCHW, variance_1C11, teacher_BCHW)
