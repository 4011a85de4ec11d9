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

# RKD's smallest distance between two images, in units of the embeddings
MIN_DISTANCE = 1e-6
# added by PKT to norms, in units of the embeddings, and to probabilities
EPSILON = 1e-7


@full_precision
def sp_loss(student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    """Return ``mean_ij (g_t,ij - g_s,ij)^2`` over the pairs of samples.

    ``g_i`` is row i, divided by its Euclidean norm, of the matrix (B, B) of inner products between
    the samples' maps. The row of a sample whose map is zero is zero and has no gradient.

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
    """Return the normalised rows (B, B) of inner products between the samples of a batch."""
    maps_BJ = features_BCHW.flatten(1)
    return normalised_channels((maps_BJ @ maps_BJ.mT)[None, ..., None])[0]


@full_precision
def rkd_loss(student_BC: Tensor, teacher_BC: Tensor, distance: float, angle: float) -> Tensor:
    """Return the smooth L1 losses of distances and angles between samples, weighted and summed.

    The distances (B, B) are divided by their mean over all pairs of different samples; distances
    below 1e-6 are set to that value and have no gradient. The angles (B, B, B) are cosines, at
    sample i, between the directions to j and to k. If j or k is i itself, or coincides with it, the
    cosine is zero and has no gradient. Each loss is the mean over all entries, zeros included.

    Args:
        student_BC: embeddings (B, C_s), B at least 2.
        teacher_BC: embeddings (B, C_t); they get no gradient.
        distance: weight of the distance loss.
        angle: weight of the angle loss.

    Returns:
        A scalar without unit.

    Raises:
        ConfigError: a weight is negative, both are 0, or the batch sizes differ or are below 2.

    Source: Park et al., arXiv 1904.05068.
    """
    require(
        _pairs_problem(student_BC, teacher_BC), *weight_problems(distance=distance, angle=angle)
    )
    teacher_BC = teacher_BC.detach()
    terms = []
    if distance:
        student_distances_BB, teacher_distances_BB = _distances(student_BC), _distances(teacher_BC)
        terms.append(distance * F.smooth_l1_loss(student_distances_BB, teacher_distances_BB))
    if angle:
        terms.append(angle * F.smooth_l1_loss(_cosines(student_BC), _cosines(teacher_BC)))
    return torch.stack(terms).sum()


def _distances(embedded_BC: Tensor) -> Tensor:
    """Return the distances (B, B) between samples in units of their mean."""
    batch = len(embedded_BC)
    # matrix products would lose the distance of two close samples to rounding
    exact = "donot_use_mm_for_euclid_dist"
    distances_BB = torch.cdist(embedded_BC, embedded_BC, compute_mode=exact).clamp_min(MIN_DISTANCE)
    same_BB = torch.eye(batch, dtype=torch.bool, device=embedded_BC.device)
    distances_BB = distances_BB.masked_fill(same_BB, 0.0)
    return distances_BB / (distances_BB.sum() / (batch * (batch - 1)))


def _cosines(embedded_BC: Tensor) -> Tensor:
    """Return the cosines (B, B, B) at sample i between the directions to j and to k."""
    directions_BBC = normalised_channels((embedded_BC - embedded_BC[:, None])[..., None])
    return directions_BBC @ directions_BBC.mT


@full_precision
def pkt_loss(student_BC: Tensor, teacher_BC: Tensor) -> Tensor:
    """Return ``mean_ij p_t,ij log (p_t,ij / p_s,ij)`` over the pairs of samples.

    ``p_i`` are the cosines between embedding i and all embeddings, scaled to 0..1 and divided by
    their sum. 1e-7 is added to the embeddings' norms and to the probabilities in the logarithm. An
    embedding of zeros has a cosine of 0 with all embeddings, itself included, and no gradient.

    Args:
        student_BC: embeddings (B, C_s), B at least 2.
        teacher_BC: embeddings (B, C_t); they get no gradient.

    Returns:
        A scalar in nats.

    Raises:
        ConfigError: the batch sizes differ or are below 2.

    Source: Passalis and Tefas, arXiv 1803.10837; the paper sums the entries, its code takes the
    mean.
    """
    require(_pairs_problem(student_BC, teacher_BC))
    student_BB, teacher_BB = _neighbours(student_BC), _neighbours(teacher_BC.detach())
    return (teacher_BB * ((teacher_BB + EPSILON) / (student_BB + EPSILON)).log()).mean()


def _neighbours(embedded_BC: Tensor) -> Tensor:
    """Return the probabilities (B, B) of each sample's neighbours."""
    # zeros are filled with zeros to remove their gradient, which would be scaled by 1 / EPSILON
    embedded_BC = embedded_BC.masked_fill((embedded_BC == 0).all(1, keepdim=True), 0.0)
    lengths_B1 = torch.linalg.vector_norm(embedded_BC, dim=1, keepdim=True)
    unit_BC = embedded_BC / (lengths_B1 + EPSILON)
    # for opposite embeddings, rounding could make the argument of the logarithm negative
    similar_BB = ((unit_BC @ unit_BC.mT + 1) / 2).clamp_min(0.0)
    return similar_BB / similar_BB.sum(1, keepdim=True)


def _pairs_problem(student_BC: Tensor, teacher_BC: Tensor) -> str | None:
    """Return a problem if embeddings are not (B, C) with the same B of at least 2."""
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

    The embedding is the mean of the maps over their positions. The loss needs at least three images
    in a batch to carry information: with two, the normalised distance is constant and there is no
    angle.

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
    """Cosines between the images' embeddings, as probabilities; see ``pkt_loss``.

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
    """Return the mean of maps over their positions (B, C)."""
    return features_BCHW.mean((2, 3))
