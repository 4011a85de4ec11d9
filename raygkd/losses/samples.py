"""Distillation of the relations between the images of a batch: SP, RKD and PKT.

Shape letters: B batch, C channels, H height, W width, J = C * H * W entries of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from raygkd.graph import full_precision, normalised_channels, require, weight_problems
from raygkd.losses.base import FeatureLoss, Setup
from raygkd.registry import METHODS, option

# RKD's smallest distance of two images, in units of the embeddings
CLOSEST = 1e-6
# PKT's guard of lengths, in units of the embeddings, and of probabilities
GUARD = 1e-7


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
    """Return the rows (B, B) of the products of the samples of a batch, of unit length."""
    maps_BJ = features_BCHW.flatten(1)
    return normalised_channels((maps_BJ @ maps_BJ.mT)[None, ..., None])[0]


@full_precision
def rkd_loss(student_BC: Tensor, teacher_BC: Tensor, distance: float, angle: float) -> Tensor:
    """Return the smooth L1 losses of distances and angles between samples, weighted and summed.

    The distances (B, B) are divided by their mean over the pairs of two samples; two samples closer
    than 1e-6 are that far apart, without gradient. The angles (B, B, B) are the cosines of those at
    sample i between the directions to j and to k; where one of these is i itself, or has its place,
    the cosine is zero, without gradient. Each loss is the mean over all entries, zeros included.

    Args:
        student_BC: embeddings (B, C_s), B at least 2.
        teacher_BC: embeddings (B, C_t); they get no gradient.
        distance: weight of the distances.
        angle: weight of the angles.

    Returns:
        A scalar without unit.

    Raises:
        ConfigError: a weight is negative, both are 0, or the batches are not of one size of at
            least 2.

    Source: Park et al., arXiv 1904.05068.
    """
    require(
        _pairs_problem(student_BC, teacher_BC), *weight_problems(distance=distance, angle=angle)
    )
    teacher_BC = teacher_BC.detach()
    terms = []
    if distance:
        apart_s, apart_t = _distances(student_BC), _distances(teacher_BC)
        terms.append(distance * F.smooth_l1_loss(apart_s, apart_t))
    if angle:
        terms.append(angle * F.smooth_l1_loss(_cosines(student_BC), _cosines(teacher_BC)))
    return torch.stack(terms).sum()


def _distances(embedded_BC: Tensor) -> Tensor:
    """Return the distances (B, B) of the samples in units of their mean."""
    batch = len(embedded_BC)
    # through products, the distance of two close samples would be lost to rounding
    exact = "donot_use_mm_for_euclid_dist"
    distances_BB = torch.cdist(embedded_BC, embedded_BC, compute_mode=exact).clamp_min(CLOSEST)
    same_BB = torch.eye(batch, dtype=torch.bool, device=embedded_BC.device)
    distances_BB = distances_BB.masked_fill(same_BB, 0.0)
    return distances_BB / (distances_BB.sum() / (batch * (batch - 1)))


def _cosines(embedded_BC: Tensor) -> Tensor:
    """Return the cosines (B, B, B) at sample i of the directions to j and to k."""
    directions_BBC = normalised_channels((embedded_BC - embedded_BC[:, None])[..., None])
    return directions_BBC @ directions_BBC.mT


@full_precision
def pkt_loss(student_BC: Tensor, teacher_BC: Tensor) -> Tensor:
    """Return ``mean_ij p_t,ij log (p_t,ij / p_s,ij)`` over the pairs of samples.

    ``p_i`` are the cosines of embedding i and all others, moved to 0..1 and divided by their sum.
    1e-7 is added to the embeddings' norms and to the probabilities in the logarithm. An embedding
    of zeros is at a cosine of 0 from all, itself included, and has no gradient.

    Args:
        student_BC: embeddings (B, C_s), B at least 2.
        teacher_BC: embeddings (B, C_t); they get no gradient.

    Returns:
        A scalar in nats.

    Raises:
        ConfigError: the batches are not of one size of at least 2.

    Source: Passalis and Tefas, arXiv 1803.10837; the paper sums the entries, the mean is that of
    its code.
    """
    require(_pairs_problem(student_BC, teacher_BC))
    student_BB, teacher_BB = _neighbours(student_BC), _neighbours(teacher_BC.detach())
    return (teacher_BB * ((teacher_BB + GUARD) / (student_BB + GUARD)).log()).mean()


def _neighbours(embedded_BC: Tensor) -> Tensor:
    """Return the probabilities (B, B) of each sample's neighbours."""
    # filled with the zeros that they are, and so cut off: the gradient would be that of 1 / GUARD
    embedded_BC = embedded_BC.masked_fill((embedded_BC == 0).all(1, keepdim=True), 0.0)
    lengths_B1 = torch.linalg.vector_norm(embedded_BC, dim=1, keepdim=True)
    unit_BC = embedded_BC / (lengths_B1 + GUARD)
    # opposite embeddings would have a logarithm of less than 0, by rounding
    similar_BB = ((unit_BC @ unit_BC.mT + 1) / 2).clamp_min(0.0)
    return similar_BB / similar_BB.sum(1, keepdim=True)


def _pairs_problem(student_BC: Tensor, teacher_BC: Tensor) -> str | None:
    """Return a problem if embeddings are not (B, C) of as many samples, at least two."""
    shapes = tuple(student_BC.shape), tuple(teacher_BC.shape)
    if len(shapes[0]) == len(shapes[1]) == 2 and shapes[0][0] == shapes[1][0] >= 2:
        return None
    return (
        "embeddings must be (B, C), with the same B of at least 2 in student and teacher;"
        f" got {shapes[0]} and {shapes[1]}"
    )


@METHODS.register("sp")
class SP(FeatureLoss):
    """Similarities of the images of a batch, see ``sp_loss``."""

    weight = 3000.0
    levels = "last"
    source = "Tung and Mori, ICCV 2019, arXiv 1907.09682"

    def level_loss(self, level: int, student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
        """Return ``sp_loss``."""
        self.require_pairs(student_BCHW)
        return sp_loss(student_BCHW, teacher_BCHW)


@METHODS.register("rkd")
class RKD(FeatureLoss):
    """Distances and angles between the images' embeddings, see ``rkd_loss``.

    The embedding is the mean of the maps over their positions. Two images have one distance, which
    always agrees, and no angle: it says something from three images in a batch on.

    Args:
        setup: what it is built for.
        distance: weight of the distances.
        angle: weight of the angles.

    Raises:
        ConfigError: a weight is negative, or both are 0.
    """

    weight = 1.0
    levels = "last"
    source = "Park et al., CVPR 2019, arXiv 1904.05068"

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        """Settings of the loss."""

        distance: float = option(25.0, "weight of the distance term", minimum=0.0)
        angle: float = option(50.0, "weight of the angle term", minimum=0.0)

    def __init__(self, setup: Setup, *, distance: float, angle: float):
        super().__init__(setup)
        require(*weight_problems(distance=distance, angle=angle))
        self.distance, self.angle = distance, angle

    def level_loss(self, level: int, student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
        """Return ``rkd_loss`` of the embeddings."""
        self.require_pairs(student_BCHW)
        embedded = _embedded(student_BCHW), _embedded(teacher_BCHW)
        return rkd_loss(*embedded, self.distance, self.angle)


@METHODS.register("pkt")
class PKT(FeatureLoss):
    """Cosines of the images' embeddings, as probabilities; see ``pkt_loss``.

    The embedding is the mean of the maps over their positions.
    """

    weight = 30000.0
    levels = "last"
    source = "Passalis and Tefas, ECCV 2018, arXiv 1803.10837"

    def level_loss(self, level: int, student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
        """Return ``pkt_loss`` of the embeddings."""
        self.require_pairs(student_BCHW)
        return pkt_loss(_embedded(student_BCHW), _embedded(teacher_BCHW))


def _embedded(features_BCHW: Tensor) -> Tensor:
    """Average maps over their positions (B, C)."""
    return features_BCHW.mean((2, 3))
