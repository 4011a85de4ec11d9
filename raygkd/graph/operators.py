"""Reference implementation of the tensor operations behind the graph and its losses.

They are ordinary functions of tensors, and autograd differentiates them to any order.
``raygkd.accelerated`` implements the same operations with faster, hand-written gradients.

On a CPU, products are several times faster when the long side comes last in memory. Thin matrices
are therefore stored as rows: (B, d, C), not (B, C, d).

Shape letters: B batch, C channels, N positions, K columns of the factor (N or N + 1), P side of a
square matrix, d vectors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from raygkd.graph.eigen import leading_pairs
from raygkd.graph.precision import full_precision


class Operators:
    """Tensor operations in full precision, see ``full_precision``."""

    @full_precision
    def unit_rows(self, maps_BCN: Tensor) -> Tensor:
        """Return rows (B, C, N) divided by their norms; a dead row and its gradient become zero.

        A row is dead when its norm is at most eps(dtype) times the largest norm in the same
        matrix.
        """
        limits = torch.finfo(maps_BCN.dtype)
        # scaling does not change the result, and keeps squares from over- or underflowing
        amplitude_B11 = largest_magnitude(maps_BCN, (1, 2))
        rows_BCN = maps_BCN / amplitude_B11.masked_fill(amplitude_B11 < limits.tiny, 1.0)
        lengths_BC1 = torch.linalg.vector_norm(rows_BCN.detach(), dim=2, keepdim=True)
        # "<=" is false for NaN, so that NaN reaches the loss and is noticed
        dead_BC1 = lengths_BC1 <= limits.eps * lengths_BC1.amax(1, keepdim=True)
        # masked out of autograd, since a norm has no gradient at zero
        alive_BCN = rows_BCN.masked_fill(dead_BC1, 1.0)
        scales_BC1 = torch.linalg.vector_norm(alive_BCN, dim=2, keepdim=True).reciprocal()
        return rows_BCN * scales_BC1.masked_fill(dead_BC1, 0.0)

    @full_precision
    def gram(self, rows_BCN: Tensor) -> Tensor:
        """Return ``X X^T`` (B, C, C)."""
        return rows_BCN @ rows_BCN.mT

    @full_precision
    def gram_times(self, vectors_BdC: Tensor, rows_BCN: Tensor) -> Tensor:
        """Return ``P X X^T`` (B, d, C) for a few rows P, without forming ``X X^T``."""
        return vectors_BdC @ rows_BCN @ rows_BCN.mT

    @full_precision
    def covariance(self, maps_BCN: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean (C,) and covariance (C, C) of the channels over samples and positions.

        The mean is subtracted first: the difference of second moments loses all precision where a
        channel's mean is large compared with its standard deviation.
        """
        batch, _, positions = maps_BCN.shape
        mean_C = maps_BCN.mean((0, 2))
        centred_BCN = maps_BCN - mean_C[:, None]
        return mean_C, (centred_BCN @ centred_BCN.mT).sum(0) / (batch * positions)

    @full_precision
    def squared_errors(
        self, rows_BCN: Tensor, targets_BCN: Tensor, weights_BN1: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return ``sum_n w_n (x_n - y_n)^2`` (B, C) of the rows x, and the mean of y^2 (B,).

        Only x needs a gradient. Both results share a scale per sample, chosen so that the squares
        of huge targets do not overflow; only their ratio is meaningful.
        """
        scale_B11 = square_safe_scale(targets_BCN)
        targets_BCN = targets_BCN * scale_B11
        error_BC1 = (rows_BCN * scale_B11 - targets_BCN).square() @ weights_BN1
        return error_BC1.squeeze(2), targets_BCN.square().mean((1, 2))

    @full_precision
    def deflated_factor(self, rows_BCN: Tensor, ones: int) -> Tensor:
        """Return ``M' = M - u0 (u0^T M)`` (B, C, K) with ``M = D^-1/2 G``.

        Args:
            rows_BCN: X of ``G = [1, X]``, or of ``G = X``; M does not depend on its scale.
            ones: number of columns of ones before X, 1 or 0.
        """
        factor_BCK = F.pad(rows_BCN, (ones, 0), value=1.0)
        degrees_BC1 = (factor_BCK * factor_BCK.sum(1, keepdim=True)).sum(2, keepdim=True)
        root_BC1, trivial_BC1 = degree_scales(degrees_BC1)
        factor_BCK = factor_BCK * root_BC1
        return factor_BCK - trivial_BC1 @ (trivial_BC1.mT @ factor_BCK)

    @full_precision
    def deflated_adjacency(self, adjacency_BCC: Tensor, shift: int) -> Tensor:
        """Return ``S' = D^-1/2 W D^-1/2 - u0 u0^T`` (B, C, C) of ``W = A + shift``.

        S' does not depend on the scale of W.
        """
        weights_BCC = adjacency_BCC + shift
        root_BC1, trivial_BC1 = degree_scales(weights_BCC.sum(2, keepdim=True))
        return root_BC1 * weights_BCC * root_BC1.mT - trivial_BC1 * trivial_BC1.mT

    def leading_pairs(self, symmetric_BPP: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return ``raygkd.graph.eigen.leading_pairs``."""
        return leading_pairs(symmetric_BPP, count)


PLAIN = Operators()


def largest_magnitude(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return max |x| over dimensions, detached; the dimensions are kept with length 1."""
    # two reductions take a third of the time of one over abs(values)
    values = values.detach()
    return torch.maximum(values.amax(dims, keepdim=True), -values.amin(dims, keepdim=True))


def square_safe_scale(maps_BCN: Tensor) -> Tensor:
    """Return factors (B, 1, 1) that scale maps above 4 down to 2..4, so that no square overflows.

    They are powers of two, which scale without rounding, and 1 for smaller maps.
    """
    amplitude_B11 = largest_magnitude(maps_BCN, (1, 2)).clamp_min(2.0)
    mantissa_B11, _ = torch.frexp(amplitude_B11)
    return 4 * mantissa_B11 / amplitude_B11


def degree_scales(degrees_BC1: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``D^-1/2`` and the trivial eigenvector (B, C, 1), both 0 at isolated vertices."""
    isolated_BC1 = degrees_BC1 <= 0
    root_BC1 = degrees_BC1.masked_fill(isolated_BC1, 1.0).rsqrt().masked_fill(isolated_BC1, 0.0)
    volume_B11 = degrees_BC1.sum(1, keepdim=True)
    length_B11 = volume_B11.masked_fill(volume_B11 <= 0, 1.0).sqrt()
    return root_BC1, degrees_BC1 * root_BC1 / length_B11
