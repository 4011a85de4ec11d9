"""The tensor operations of the graph and its losses, with hand-written gradients.

Shape letters: B batch, C channels, N positions, K columns of the factor (N or N + 1), P side of a
square matrix, d vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raygkd.accelerated.deflation import Deflated, DeflatedAdjacency
from raygkd.accelerated.eigenproblems import eigh
from raygkd.accelerated.parts import part_size
from raygkd.accelerated.products import Covariance, Gram, GramTimes, UnitRows, WeightedSquares
from raygkd.graph.eigen import leading_pairs
from raygkd.graph.operators import Operators, square_safe_scale
from raygkd.graph.precision import full_precision

# the squares of targets with a smaller norm are far from overflowing
SAFE_LENGTH = 1e15


class FastOperators(Operators):
    """``Operators`` that can be differentiated once, and not by ``torch.func``."""

    @full_precision
    def unit_rows(self, maps_BCN: Tensor) -> Tensor:
        """Return ``UnitRows``."""
        return UnitRows.apply(maps_BCN)

    @full_precision
    def gram(self, rows_BCN: Tensor) -> Tensor:
        """Return ``Gram``."""
        return Gram.apply(rows_BCN)

    @full_precision
    def gram_times(self, vectors_BdC: Tensor, rows_BCN: Tensor) -> Tensor:
        """Return ``GramTimes``."""
        return GramTimes.apply(vectors_BdC, rows_BCN)

    @full_precision
    def covariance(self, maps_BCN: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``Covariance``, computed in parts of the batch."""
        return Covariance.apply(maps_BCN, part_size(maps_BCN))

    @full_precision
    def squared_errors(
        self, rows_BCN: Tensor, targets_BCN: Tensor, weights_BN1: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return ``WeightedSquares``; on a CPU, they are only scaled if targets are huge."""
        scale_B11 = None
        # a norm takes one pass, a mean of squares two
        length_B = torch.linalg.vector_norm(targets_BCN, dim=(1, 2))
        # on a GPU, checking the norm would synchronise
        if targets_BCN.is_cuda or not bool(length_B.amax() < SAFE_LENGTH):
            scale_B11 = square_safe_scale(targets_BCN)
            targets_BCN = targets_BCN * scale_B11
            length_B = torch.linalg.vector_norm(targets_BCN, dim=(1, 2))
        error_BC = WeightedSquares.apply(rows_BCN, targets_BCN, weights_BN1, scale_B11)
        return error_BC, length_B.square() / targets_BCN[0].numel()

    @full_precision
    def deflated_factor(self, rows_BCN: Tensor, ones: int) -> Tensor:
        """Return ``Deflated``."""
        return Deflated.apply(rows_BCN, ones)

    @full_precision
    def deflated_adjacency(self, adjacency_BCC: Tensor, shift: int) -> Tensor:
        """Return ``DeflatedAdjacency``, which needs a symmetric gradient."""
        return DeflatedAdjacency.apply(adjacency_BCC, shift)

    def leading_pairs(self, symmetric_BPP: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the leading eigenpairs, computed on threads."""
        return leading_pairs(symmetric_BPP, count, eigh)


FAST = FastOperators()
