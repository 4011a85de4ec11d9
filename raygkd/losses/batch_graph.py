"""Edge and spectral losses of one channel graph for a whole batch.

The vertices of the graph are a level's channels. Its edges are their correlations over all
positions of all images of the batch, that is, cosines of centred maps. At a deep level, a single
image has too few positions to tell channels apart; without centring, all channels look alike after
a ReLU. The correlations after a 1x1 convolution follow from the covariance of its input, so its
output need not be formed.

[paper] (arXiv 2405.08547): channels as vertices, cosines as edges, and the alignment of edges and
of a spectral embedding. [ours]: one graph per batch, the weights of channels, and both formulas.

Shape letters: C channels, d spectral dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raygkd.graph import full_precision
from raygkd.graph.eigen import without_nonfinite

# added to each channel's variance, in units of the mean variance of all channels
VARIANCE_FLOOR = 1e-2
# how sharply the weights of eigenpairs fall around the spectral dimension
CUT_POWER = 8


@full_precision
def correlations(covariance_CC: Tensor) -> Tensor:
    """Return correlations of channels, damped for channels that hardly vary.

    ``R_ij = C_ij / sqrt((C_ii + f) (C_jj + f))``, where f is a hundredth of the mean variance. The
    correlations and the gradient of a dying channel thus go to zero with it, and its diagonal entry
    is below 1.

    Args:
        covariance_CC: covariance of the channels.

    Returns:
        (C, C), in [-1, 1]; all zero where no channel varies.

    Source: [ours].
    """
    variances_C = covariance_CC.diagonal()
    floor = VARIANCE_FLOOR * variances_C.mean()
    # if no channel varies, any scale will do
    floor = torch.where(floor > torch.finfo(floor.dtype).tiny, floor, 1.0)
    scales_C = (variances_C + floor).rsqrt()
    return covariance_CC * scales_C[:, None] * scales_C


@full_precision
def batch_edge_loss(student_CC: Tensor, teacher_CC: Tensor) -> Tensor:
    """Return ``sum_{i != j} w_ij (R_t,ij - R_s,ij)^2`` with ``w_ij ~ sigma_i sigma_j``, sum 1.

    Pairs of channels are weighted by the teacher's standard deviations sigma, so that pairs without
    a signal have no effect.

    Args:
        student_CC: covariance of the student's channels after the adapter.
        teacher_CC: covariance of the teacher's channels; it gets no gradient.

    Returns:
        A scalar in squared correlations, 0 for fewer than two channels that vary.

    Source: [paper] alignment of edges; the formula is [ours].
    """
    teacher_CC = teacher_CC.detach()
    deviations_C = teacher_CC.diagonal().clamp_min(0.0).sqrt()
    weights_CC = deviations_C[:, None] * deviations_C
    weights_CC = weights_CC - weights_CC.diagonal().diag()
    total = weights_CC.sum()
    total = torch.where(total > torch.finfo(total.dtype).tiny, total, 1.0)
    squares_CC = (correlations(teacher_CC) - correlations(student_CC)).square()
    return (weights_CC / total * squares_CC).sum()


@full_precision
def batch_spectral_loss(student_CC: Tensor, teacher_CC: Tensor, dim: int) -> Tensor:
    """Return how far the teacher's leading eigenpairs are from being the student's.

    ``sum_k g_k |S_s u_k - l_k u_k|^2 / sum_k g_k l_k^2`` over the eigenpairs (l_k, u_k) of the
    teacher's ``S = D^-1/2 W D^-1/2`` with ``W = (1 + R) / 2``, without its trivial pair. The
    weights ``g_k = 1 / (1 + (c / l_k)^8)`` fall from 1 to 0 around the cutoff c, the mean of
    eigenvalues d and d + 1. They depend on eigenvalues alone, so the loss does not depend on the
    choice of eigenvectors for a repeated eigenvalue, not even at the cutoff.

    Args:
        student_CC: covariance of the student's channels after the adapter.
        teacher_CC: covariance of the teacher's channels; it gets no gradient.
        dim: spectral dimension d, from 1 to C - 1.

    Returns:
        A scalar without unit, 0 if the teacher's graph has no spectrum.

    Source: [paper] alignment of a spectral embedding; the formula is [ours].
    """
    with torch.no_grad():
        [finite_CC], [nonfinite_11] = without_nonfinite(
            _normalised_graph(correlations(teacher_CC))[None]
        )
        values_C, vectors_CC = torch.linalg.eigh(finite_CC)
        values_C = values_C.clamp_min(0.0).masked_fill(nonfinite_11[0], math.nan)
        # the C pairs include the trivial one, whose eigenvalue is now 0
        cut = (values_C[-dim] + values_C[-dim - 1]) / 2
        powers_C = values_C**CUT_POWER
        tiny = torch.finfo(values_C.dtype).tiny
        weights_C = powers_C / (powers_C + cut**CUT_POWER).clamp_min(tiny)
        power = (weights_C * values_C.square()).sum()
    images_CC = _normalised_graph(correlations(student_CC)) @ vectors_CC
    errors_C = (images_CC - vectors_CC * values_C).square().sum(0)
    return (weights_C * errors_C).sum() / power.clamp_min(torch.finfo(values_C.dtype).eps ** 2)


def _normalised_graph(correlations_CC: Tensor) -> Tensor:
    """Return ``D^-1/2 W D^-1/2`` of ``W = (1 + R) / 2`` without its trivial eigenpair (C, C)."""
    weights_CC = (1 + correlations_CC) / 2
    degrees_C = weights_CC.sum(1)
    root_C = degrees_C.rsqrt()
    trivial_C = (degrees_C / degrees_C.sum()).sqrt()
    return root_C[:, None] * weights_CC * root_C - trivial_C[:, None] * trivial_C
