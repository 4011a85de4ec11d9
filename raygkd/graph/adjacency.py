"""The channels relational graph: vertices are channels, edges the cosines of their maps.

Shape letters: B batch, C channels, H height, W width, N = H * W positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raygkd.graph.operators import PLAIN, Operators, largest_magnitude
from raygkd.graph.precision import full_precision

# the error of a mean, in units of eps times the mean
ROUNDING = 16


def normalised_channels(features_BCHW: Tensor, operators: Operators = PLAIN) -> Tensor:
    """Flatten each channel's map and divide it by its Euclidean norm: the factor of ``adjacency``.

    A channel is dead when its squared norm is at most eps(dtype)^2 times the largest one's of the
    same sample, or when all are zero. Its row and its gradient are exactly zero, where dividing by
    a small constant would give it a gradient of that constant's inverse.

    Args:
        features_BCHW: feature maps (B, C, H, W).
        operators: what it is made of.

    Returns:
        (B, C, N) rows of unit length, or zero; float32, or float64 for float64 maps.

    Source: [paper] arXiv 2405.08547 (cosine similarity); the rule for dead channels is [ours].
    """
    return operators.unit_rows(features_BCHW.flatten(2))


@full_precision
def centred(features_BCHW: Tensor) -> Tensor:
    """Subtract from each channel its mean over the positions: cosines then are correlations.

    A channel that is constant to rounding becomes exactly zero, and so does its gradient: dividing
    what rounding leaves of it by its norm would make noise a signal.

    Args:
        features_BCHW: feature maps (B, C, H, W).

    Returns:
        (B, C, H, W), float32, or float64 for float64 maps.

    Source: [ours]; that detectors are compared by correlations is PKD's, arXiv 2207.02039.
    """
    means_BC11 = features_BCHW.mean((2, 3), keepdim=True)
    rest_BCHW = features_BCHW - means_BC11
    rounding_BC11 = ROUNDING * torch.finfo(rest_BCHW.dtype).eps * means_BC11.detach().abs()
    constant_BC11 = largest_magnitude(rest_BCHW, (2, 3)) <= rounding_BC11
    # a product, since filling takes four times as long
    return rest_BCHW * (~constant_BC11).to(rest_BCHW.dtype)


def adjacency(features_BCHW: Tensor) -> Tensor:
    """Return the weighted adjacency ``A_ij = <F_i, F_j> / (|F_i| |F_j|)`` of the channels.

    Args:
        features_BCHW: feature maps (B, C, H, W).

    Returns:
        (B, C, C) cosines in [-1, 1]; the row and column of a dead channel are zero.

    Source: [paper] arXiv 2405.08547.
    """
    return PLAIN.gram(normalised_channels(features_BCHW))
