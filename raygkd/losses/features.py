"""Distillation of a classifier's feature maps: FitNet, SP and ICKD.

Shape letters: B batch, C channels, H height, W width, N = H * W positions, R rows,
J = C * H * W entries of a sample.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from raygkd.graph import full_precision, normalised_channels, require, shape_problem
from raygkd.losses.adapters import statistics_problem
from raygkd.losses.base import AlignedLoss, FeatureLoss


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
    return F.mse_loss(student_BCHW, teacher_BCHW.detach())


@full_precision
def ickd_loss(student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    """Return ``sum_ij (g_t,ij - g_s,ij)^2 / C``, averaged over samples.

    ``g_i`` is row i, divided by its Euclidean norm, of the matrix (C, C) of the inner products of
    the channels' maps. Neither the scale of a channel of its own nor that of the others is taken
    out of the products before. The row of a channel whose map is zero is zero, without gradient.

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
    """Return the rows (B, C, C) of the products of the channels of each sample."""
    maps_BCN = features_BCHW.flatten(2)
    return _unit_rows(maps_BCN @ maps_BCN.mT)


@full_precision
def sp_loss(student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    """Return ``mean_ij (g_t,ij - g_s,ij)^2`` over the pairs of samples.

    ``g_i`` is row i, divided by its Euclidean norm, of the matrix (B, B) of the inner products of
    the samples' whole maps. The row of a sample whose map is zero is zero, without gradient.

    Args:
        student_BCHW: feature maps (B, C_s, H_s, W_s).
        teacher_BCHW: feature maps (B, C_t, H_t, W_t); they get no gradient.

    Returns:
        A scalar without unit.

    Source: Tung and Mori, arXiv 1907.09682.
    """
    difference_BB = _similarities(teacher_BCHW.detach()) - _similarities(student_BCHW)
    return difference_BB.square().mean()


def _similarities(features_BCHW: Tensor) -> Tensor:
    """Return the rows (B, B) of the products of the samples of a batch."""
    maps_BJ = features_BCHW.flatten(1)
    return _unit_rows((maps_BJ @ maps_BJ.mT)[None])[0]


def _unit_rows(products_BRR: Tensor) -> Tensor:
    """Divide rows by their Euclidean norms; a row of zeros stays one, without gradient."""
    return normalised_channels(products_BRR[..., None])


class NormalisedConvolution(nn.Sequential):
    """A 1x1 convolution with batch normalisation, which takes any bias of it out again."""

    def __init__(self, student_channels: int, teacher_channels: int):
        super().__init__(
            nn.Conv2d(student_channels, teacher_channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(teacher_channels),
        )

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Return (B, C_t, H, W); ConfigError when training on one position of one image."""
        batch, _, height, width = features_BCHW.shape
        if self.training:
            require(statistics_problem(batch * height * width))
        return super().forward(features_BCHW)


class FitNet(AlignedLoss):
    """Hints: the student's map, behind a regressor, against the teacher's, see ``hint_loss``.

    The regressor is RepDistiller's for maps of one size, a 1x1 convolution, batch normalisation
    and ReLU; maps of different sizes are first pooled to the coarser grid, where RepDistiller's
    convolution strides.
    """

    def adapter(self, student_channels: int, teacher_channels: int) -> nn.Module:
        """Return convolution, batch normalisation and ReLU."""
        return nn.Sequential(NormalisedConvolution(student_channels, teacher_channels), nn.ReLU())

    def level_loss(self, level: int, student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
        """Return ``hint_loss``."""
        return hint_loss(*self.aligned(level, student_BCHW, teacher_BCHW))


class SP(FeatureLoss):
    """Similarities of the images of a batch, see ``sp_loss``."""

    def level_loss(self, level: int, student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
        """Return ``sp_loss``."""
        self.require_pairs(student_BCHW)
        return sp_loss(student_BCHW, teacher_BCHW)


class ICKD(AlignedLoss):
    """Correlations of channels, see ``ickd_loss``, behind a ``NormalisedConvolution``."""

    def adapter(self, student_channels: int, teacher_channels: int) -> nn.Module:
        """Return convolution and batch normalisation."""
        return NormalisedConvolution(student_channels, teacher_channels)

    def level_loss(self, level: int, student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
        """Return ``ickd_loss``."""
        return ickd_loss(*self.aligned(level, student_BCHW, teacher_BCHW))
