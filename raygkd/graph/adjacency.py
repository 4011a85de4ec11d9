"""The channels relational graph: vertices are channels, edges are cosines between their maps.

Shape letters: B batch, C channels, H height, W width, N = H * W positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raygkd.graph.operators import PLAIN, Operators, largest_magnitude
from raygkd.graph.precision import full_precision

# bound of the rounding error of a mean, in units of eps times the mean
ROUNDING = 16


def normalised_channels(features_BCHW: Tensor, operators: Operators = PLAIN) -> Tensor:
    """Flatten each channel's map and divide it by its Euclidean norm: the factor of ``adjacency``.

    A channel is dead when its squared norm is at most eps(dtype)^2 times the largest squared norm
    in the same sample, or when all channels are zero. Its row and its gradient are exactly zero.
    Dividing by a small constant instead would scale its gradient by the inverse of that constant.

    Args:
        features_BCHW: feature maps (B, C, H, W).
        operators: implementation of the tensor operations.

    Returns:
        (B, C, N) rows of unit length, or zero; float32, or float64 for float64 maps.

    Source: [paper] arXiv 2405.08547 (cosine similarity); the rule for dead channels is [ours].
    """
    return operators.unit_rows(features_BCHW.flatten(2))


@full_precision
def centred(features_BCHW: Tensor) -> Tensor:
    """Subtract each channel's mean over the positions, so that cosines become correlations.

    A channel that is constant up to rounding becomes exactly zero, and so does its gradient.
    Otherwise, dividing its rounding errors by their norm would turn noise into a signal.

    Args:
        features_BCHW: feature maps (B, C, H, W).

    Returns:
        (B, C, H, W), float32, or float64 for float64 maps.

    Source: [ours]; PKD, arXiv 2207.02039, compares detectors by correlations.
    """
    means_BC11 = features_BCHW.mean((2, 3), keepdim=True)
    centred_BCHW = features_BCHW - means_BC11
    rounding_BC11 = ROUNDING * torch.finfo(centred_BCHW.dtype).eps * means_BC11.detach().abs()
    constant_BC11 = largest_magnitude(centred_BCHW, (2, 3)) <= rounding_BC11
    # multiplying is four times as fast as masked_fill
    return centred_BCHW * (~constant_BC11).to(centred_BCHW.dtype)


def adjacency(features_BCHW: Tensor) -> Tensor:
    """Return the weighted adjacency ``A_ij = <F_i, F_j> / (|F_i| |F_j|)`` of the channels.

    Args:
        features_BCHW: feature maps (B, C, H, W).

    Returns:
        (B, C, C) cosines in [-1, 1]; the row and column of a dead channel are zero.

    Source: [paper] arXiv 2405.08547.
    """
    return PLAIN.gram(normalised_channels(features_BCHW))
