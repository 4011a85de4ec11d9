"""Spectral embedding of the channels relational graph, from the smaller of two eigenproblems.

The graph's weights are ``W = G G^T``, its normalised adjacency ``S = D^-1/2 W D^-1/2 = M M^T`` with
``M = D^-1/2 G`` and degrees ``D_i = sum_j W_ij``. The top eigenpair of S, (1, u0) with
``u0 ~ D^1/2 1``, is known in advance and carries no information, so it is removed:
``S' = S - u0 u0^T = M' M'^T`` with ``M' = M - u0 (u0^T M)``. The eigenvectors are computed from S'
itself (C x C), or from ``M'^T M'`` (K x K) if there are more channels than positions. All of this
is [ours]; the paper (arXiv 2405.08547) mentions a spectral embedding.

Shape letters: B batch, C channels, H height, W width, N = H * W positions,
K columns of the factor (N + 1 "shifted", N "cosine"), P side of a square matrix,
d spectral dimension.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from raygkd.graph.adjacency import normalised_channels
from raygkd.graph.checks import choice_problem, dimension_problem, require
from raygkd.graph.operators import PLAIN, Operators, degree_scales
from raygkd.graph.precision import full_precision

WEIGHTS = ("shifted", "cosine")
# rounding error left in S' of a complete graph, in units of eps
COMPLETE_GRAPH_ROUNDING = 16


@full_precision
def normalised_factor(features_BCHW: Tensor, weights: str = "shifted") -> tuple[Tensor, Tensor]:
    """Return the factor M of the normalised graph ``S = M M^T`` and its trivial eigenvector.

    "shifted" weights are ``W = (1 + A) / 2``, in [0, 1] for every map: ``G = [1, X] / sqrt(2)``.
    "cosine" weights are ``W = A``, with ``G = X``. They must not be negative, so the map is
    rectified first. That changes nothing for a layer that ends in a ReLU; for other layers, the
    graph is that of the positive parts. A dead channel is an isolated vertex: its row of M and its
    entry of u0 are zero.

    Args:
        features_BCHW: feature maps (B, C, H, W).
        weights: "shifted" or "cosine".

    Returns:
        M (B, C, K) with K = N + 1 ("shifted") or N ("cosine"), and u0 (B, C) of unit length (zero
        when every channel is isolated).

    Raises:
        ConfigError: the weights are unknown.

    Source: [ours].
    """
    factor_BCK = unit_rows(features_BCHW, weights)
    if weights == "shifted":
        factor_BCK = F.pad(factor_BCK, (1, 0), value=1.0) / math.sqrt(2)
    degrees_BC1 = (factor_BCK * factor_BCK.sum(1, keepdim=True)).sum(2, keepdim=True)
    root_BC1, trivial_BC1 = degree_scales(degrees_BC1)
    return factor_BCK * root_BC1, trivial_BC1.squeeze(2)


def deflated_factor(features_BCHW: Tensor, weights: str = "shifted") -> Tensor:
    """Return ``M' = M - u0 (u0^T M)``, the factor of ``S' = S - u0 u0^T = M' M'^T``.

    Args:
        features_BCHW: feature maps (B, C, H, W).
        weights: "shifted" or "cosine", see ``normalised_factor``.

    Returns:
        (B, C, K).

    Raises:
        ConfigError: the weights are unknown.

    Source: [ours].
    """
    return PLAIN.deflated_factor(unit_rows(features_BCHW, weights), int(weights == "shifted"))


def unit_rows(features_BCHW: Tensor, weights: str, operators: Operators = PLAIN) -> Tensor:
    """Return the rows X (B, C, N) from whose products the graph's weights are computed."""
    require(choice_problem("graph weights", weights, WEIGHTS))
    if weights == "cosine":
        features_BCHW = features_BCHW.relu()
    return normalised_channels(features_BCHW, operators)


def nontrivial_pairs(channels: int, positions: int, weights: str = "shifted") -> int:
    """Return min(C, K) - 1, the largest number of non-zero eigenvalues that S' can have."""
    columns = positions + int(weights == "shifted")
    return max(0, min(channels, columns) - 1)


class ChannelGraphs:
    """The graphs of a batch of feature maps; intermediate results are computed once and cached.

    If there are no more channels than positions, everything is computed from the adjacencies
    (B, C, C); otherwise from the rows, without forming any C x C matrix.

    Args:
        features_BCHW: feature maps (B, C, H, W).
        weights: "shifted" or "cosine", see ``normalised_factor``.
        operators: implementation of the tensor operations.

    Attributes:
        rows_BCN: ``unit_rows`` of the maps.
        dense: whether there are no more channels than positions.

    Raises:
        ConfigError: the weights are unknown.
    """

    def __init__(
        self, features_BCHW: Tensor, weights: str = "shifted", operators: Operators = PLAIN
    ):
        self._operators = operators
        self.rows_BCN = unit_rows(features_BCHW, weights, operators)
        self.dense = self.rows_BCN.shape[1] <= self.rows_BCN.shape[2]
        # W = A + shift up to a factor, on which S does not depend
        self._shift = int(weights == "shifted")

    @functools.cached_property
    def adjacency_BCC(self) -> Tensor:
        """Return ``adjacency`` of the maps, or of their positive parts with "cosine" weights."""
        return self._operators.gram(self.rows_BCN)

    def times(self, vectors_BCd: Tensor) -> Tensor:
        """Return ``S' U`` (B, C, d) for vectors U."""
        if self.dense:
            return _adjacency_times(self.adjacency_BCC, vectors_BCd, self._shift)
        return _rows_times(self.rows_BCN, vectors_BCd, self._shift, self._operators)

    def spectrum(self, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Return leading eigenpairs of ``smaller_matrix``.

        Args:
            count: number of pairs, at most P; None for all.

        Returns:
            eigenvalues (B, d), descending, and vectors (B, P, d) in columns.
        """
        small_BPP = self.smaller_matrix()
        side = small_BPP.shape[1]
        return self._operators.leading_pairs(small_BPP, side if count is None else min(count, side))

    def smaller_matrix(self) -> Tensor:
        """Return S' (B, C, C), or ``M'^T M'`` (B, K, K) for more channels than positions."""
        if self.dense:
            return self._operators.deflated_adjacency(self.adjacency_BCC, self._shift)
        return self._operators.gram(self._factor_BCK.mT)

    def embedding(
        self, dim: int, spectrum: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return ``spectral_embedding`` of the maps.

        Args:
            dim: number of pairs d, from 1 to C - 1.
            spectrum: result of ``spectrum`` for the same maps, if available; it gives the same
                embedding bit for bit.

        Raises:
            ConfigError: dim is outside 1..C-1.
        """
        channels = self.rows_BCN.shape[1]
        require(dimension_problem(dim, channels))
        values_BP, vectors_BPP = self.spectrum(dim) if spectrum is None else spectrum
        factor_BCK = None if self.dense else self._factor_BCK
        return _embedding_from_pairs(
            values_BP[:, :dim], vectors_BPP[:, :, :dim], dim, channels, factor_BCK
        )

    @functools.cached_property
    def _factor_BCK(self) -> Tensor:
        return self._operators.deflated_factor(self.rows_BCN, self._shift)


@full_precision
def _adjacency_times(adjacency_BCC: Tensor, vectors_BCd: Tensor, shift: int) -> Tensor:
    """Return ``S' U`` (B, C, d)."""
    degrees_BC1 = adjacency_BCC.sum(2, keepdim=True)
    return _times(lambda scaled_BdC: scaled_BdC @ adjacency_BCC, degrees_BC1, vectors_BCd, shift)


@full_precision
def _rows_times(rows_BCN: Tensor, vectors_BCd: Tensor, shift: int, operators: Operators) -> Tensor:
    """Return ``S' U`` (B, C, d), by products with the rows."""
    degrees_BC1 = (rows_BCN * rows_BCN.sum(1, keepdim=True)).sum(2, keepdim=True)
    return _times(
        lambda scaled_BdC: operators.gram_times(scaled_BdC, rows_BCN),
        degrees_BC1,
        vectors_BCd,
        shift,
    )


def _times(
    product: Callable[[Tensor], Tensor], degrees_BC1: Tensor, vectors_BCd: Tensor, shift: int
) -> Tensor:
    """Return ``S' U`` (B, C, d).

    Args:
        product: returns ``P A`` (B, d, C) for rows P.
        degrees_BC1: row sums of A.
        vectors_BCd: U.
        shift: constant added to the entries of A, which is not formed.
    """
    vectors_BdC = vectors_BCd.mT.contiguous()
    root_BC1, trivial_BC1 = degree_scales(degrees_BC1 + shift * degrees_BC1.shape[1])
    root_B1C, trivial_B1C = root_BC1.mT, trivial_BC1.mT
    scaled_BdC = root_B1C * (vectors_BdC - (vectors_BdC @ trivial_BC1) * trivial_B1C)
    image_BdC = root_B1C * (product(scaled_BdC) + shift * scaled_BdC.sum(2, keepdim=True))
    return (image_BdC - (image_BdC @ trivial_BC1) * trivial_B1C).mT


def spectral_embedding(
    features_BCHW: Tensor, dim: int, weights: str = "shifted"
) -> tuple[Tensor, Tensor]:
    """Return the ``dim`` leading non-trivial eigenpairs of the normalised graph S.

    They correspond to the ``dim`` smallest non-trivial eigenvalues of the normalised Laplacian
    I - S. The sign of an eigenvector is arbitrary, and so is the basis of the eigenspace of a
    repeated eigenvalue: compare embeddings only by quantities that do not depend on these choices.
    Pairs whose eigenvalue is zero up to rounding, and pairs beyond the possible rank
    (``nontrivial_pairs``), are returned as eigenvalue 0 with a zero vector and have zero gradient.
    In float32, with no more channels than positions, eigenvalues up to 2e-6 count as zero if all
    cosines are above 0.99999.

    Args:
        features_BCHW: feature maps (B, C, H, W).
        dim: number of pairs d, from 1 to C - 1.
        weights: "shifted" or "cosine", see ``normalised_factor``.

    Returns:
        eigenvalues (B, d) in [0, 1], descending, and vectors (B, C, d) in columns of unit length.
        NaN, not an exception, for a sample that is not finite.

    Raises:
        ConfigError: dim is outside 1..C-1, or the weights are unknown.

    Source: [ours].
    """
    return ChannelGraphs(features_BCHW, weights).embedding(dim)


@full_precision
def _embedding_from_pairs(
    values_Bd: Tensor,
    vectors_BPd: Tensor,
    dim: int,
    channels: int,
    factor_BCK: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the embedding, given the leading eigenpairs of the smaller matrix.

    Args:
        values_Bd: eigenvalues, descending; possibly fewer than dim.
        vectors_BPd: vectors in columns.
        dim: number of pairs d.
        channels: C.
        factor_BCK: M' if the matrix is ``M'^T M'``; None if it is S'.
    """
    # The rounding error of eigenvalues is relative to the largest one. The second term is for a
    # complete graph, whose S' and M' consist of the rounding errors of S and M.
    eps = torch.finfo(values_Bd.dtype).eps
    rounding = COMPLETE_GRAPH_ROUNDING * eps if factor_BCK is None else 100 * eps**2 * channels
    null_Bd = values_Bd <= eps * channels * values_Bd[:, :1].detach() + rounding
    vectors_BCd = vectors_BPd
    if factor_BCK is not None:
        vectors_BCd = factor_BCK @ vectors_BPd
        vectors_BCd = vectors_BCd * values_Bd.masked_fill(null_Bd, 1.0).rsqrt()[:, None, :]
    padding = (0, dim - values_Bd.shape[1])
    return (
        F.pad(values_Bd.masked_fill(null_Bd, 0.0), padding),
        F.pad(vectors_BCd.masked_fill(null_Bd[:, None, :], 0.0), padding),
    )
