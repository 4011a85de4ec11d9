"""The operators of the graph and its losses, with gradients written by hand.

Shape letters: B batch, C channels, N positions, K columns of the factor (N or N + 1), P side of a
square matrix, d vectors.
"""

from __future__ import annotations

from torch import Tensor

from raygkd.accelerated.deflation import Deflated, DeflatedAdjacency
from raygkd.accelerated.eigenproblems import eigh
from raygkd.accelerated.parts import part_size
from raygkd.accelerated.products import Covariance, Gram, GramTimes, UnitRows, WeightedSquares
from raygkd.graph.eigen import leading_pairs
from raygkd.graph.operators import Operators
from raygkd.graph.precision import full_precision


class FastOperators(Operators):
    """``Operators`` whose gradients are there once, and not for ``torch.func``."""

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
        """Return ``Covariance``, a part of the batch at a time."""
        return Covariance.apply(maps_BCN, part_size(maps_BCN))

    @full_precision
    def weighted_squares(
        self, rows_BCN: Tensor, scale_B11: Tensor, targets_BCN: Tensor, weights_BN1: Tensor
    ) -> Tensor:
        """Return ``WeightedSquares``."""
        return WeightedSquares.apply(rows_BCN, scale_B11, targets_BCN, weights_BN1)

    @full_precision
    def deflated_factor(self, rows_BCN: Tensor, ones: int) -> Tensor:
        """Return ``Deflated``."""
        return Deflated.apply(rows_BCN, ones)

    @full_precision
    def deflated_adjacency(self, adjacency_BCC: Tensor, shift: int) -> Tensor:
        """Return ``DeflatedAdjacency``, for a symmetric gradient."""
        return DeflatedAdjacency.apply(adjacency_BCC, shift)

    def leading_pairs(self, symmetric_BPP: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the pairs of matrices that are decomposed on threads."""
        return leading_pairs(symmetric_BPP, count, eigh)


FAST = FastOperators()
