"""Spectral embedding of the channels relational graph, through a small factor.

The graph's weights are ``W = G G^T``, its normalised form ``S = D^-1/2 W D^-1/2 = M M^T`` with
``M = D^-1/2 G`` and degrees ``D_i = sum_j W_ij``. The top eigenpair of S, (1, u0) with
``u0 ~ D^1/2 1``, is known and says nothing: it is projected out of the factor, so that
``S' = S - u0 u0^T = M' M'^T``. The eigenvectors of S' follow from the smaller of ``M' M'^T``
(C x C) and ``M'^T M'`` (K x K). All of it is [ours]; the paper (arXiv 2405.08547) names a spectral
embedding.

Shape letters: B batch, C channels, H height, W width, N = H * W positions,
K columns of the factor (N + 1 "shifted", N "cosine"), P side of a square matrix,
d spectral dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from raygkd.graph.adjacency import normalised_channels
from raygkd.graph.checks import choice_problem, dimension_problem, require
from raygkd.graph.eigen import GramEigen
from raygkd.graph.precision import full_precision
from raygkd.graph.products import GramTimes

WEIGHTS = ("shifted", "cosine")


@full_precision
def normalised_factor(features_BCHW: Tensor, weights: str = "shifted") -> tuple[Tensor, Tensor]:
    """Return the factor M of the normalised graph ``S = M M^T`` and its trivial eigenvector.

    "shifted" weights are ``W = (1 + A) / 2``, in [0, 1] for every map: ``G = [1, X] / sqrt(2)``.
    "cosine" weights are ``W = A``, with ``G = X``. They must not be negative, as holds after a
    ReLU, so the map is rectified first: nothing changes for a layer that ends in a ReLU, and
    elsewhere the graph is that of the positive parts. A dead channel is isolated there: its row of
    M and its entry of u0 are zero.

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
    factor_BCK = _weights_factor(features_BCHW, weights)
    degrees_BC1 = (factor_BCK * factor_BCK.sum(1, keepdim=True)).sum(2, keepdim=True)
    root_BC1, trivial_BC1 = _scales(degrees_BC1)
    return factor_BCK * root_BC1, trivial_BC1.squeeze(2)


@full_precision
def deflated_factor(features_BCHW: Tensor, weights: str = "shifted") -> Tensor:
    """Return ``M' = M - u0 (u0^T M)``, the factor of ``S' = S - u0 u0^T = M' M'^T``.

    Deflating the factor rather than S keeps what is left accurate when the graph is nearly
    complete and S' is small beside S.

    Args:
        features_BCHW: feature maps (B, C, H, W).
        weights: "shifted" or "cosine", see ``normalised_factor``.

    Returns:
        (B, C, K).

    Raises:
        ConfigError: the weights are unknown.

    Source: [ours].
    """
    return Deflated.apply(_weights_factor(features_BCHW, weights))


def _weights_factor(features_BCHW: Tensor, weights: str) -> Tensor:
    """Return G (B, C, K) of the weights ``W = G G^T``."""
    rows_BCN = unit_rows(features_BCHW, weights)
    if weights == "shifted":
        return F.pad(rows_BCN, (1, 0), value=1.0) / math.sqrt(2)
    return rows_BCN


class Deflated(torch.autograd.Function):
    """``M' = M - u0 t^T`` with ``M = D^-1/2 G`` and ``t = M^T u0``, in few passes over G."""

    @staticmethod
    def forward(ctx: Any, factor_BCK: Tensor) -> Tensor:
        """Return M' (B, C, K) of G (B, C, K)."""
        sums_B1K = factor_BCK.sum(1, keepdim=True)
        degrees_BC1 = (factor_BCK * sums_B1K).sum(2, keepdim=True)
        root_BC1, trivial_BC1 = _scales(degrees_BC1)
        projected_B1K = (trivial_BC1 * root_BC1).mT @ factor_BCK
        ctx.save_for_backward(factor_BCK, sums_B1K, degrees_BC1, projected_B1K)
        return (factor_BCK * root_BC1).addcmul_(trivial_BC1, projected_B1K, value=-1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BCK: Tensor) -> Tensor:
        """Return the gradient of G: that of M' scaled, and three matrices of rank one.

        What of it is across u0 goes to M, and through D^-1/2 and ``u0 = sqrt(D) / |sqrt(D)|`` to
        the degrees, which are ``G G^T 1``.
        """
        factor_BCK, sums_B1K, degrees_BC1, projected_B1K = ctx.saved_tensors
        root_BC1, trivial_BC1 = _scales(degrees_BC1)
        volume_B11 = degrees_BC1.sum(1, keepdim=True)
        volume_B11 = volume_B11.masked_fill(volume_B11 <= 0, 1.0)

        along_B1K = trivial_BC1.mT @ grad_BCK
        shared_BC1 = (factor_BCK * along_B1K).sum(2, keepdim=True)
        to_root_BC1 = (grad_BCK * factor_BCK).sum(2, keepdim=True) - trivial_BC1 * shared_BC1
        to_trivial_BC1 = -(grad_BCK * projected_B1K).sum(2, keepdim=True) - root_BC1 * shared_BC1
        to_length_B11 = (to_trivial_BC1 * trivial_BC1).sum(1, keepdim=True)
        to_degrees_BC1 = to_trivial_BC1 * root_BC1 / volume_B11.sqrt() - to_length_B11 / volume_B11
        to_degrees_BC1 = (to_degrees_BC1 - to_root_BC1 * root_BC1**3) / 2

        ones_BC1 = torch.ones_like(root_BC1)
        left_BC3 = torch.cat([-root_BC1 * trivial_BC1, to_degrees_BC1, ones_BC1], 2)
        right_B3K = torch.cat([along_B1K, sums_B1K, to_degrees_BC1.mT @ factor_BCK], 1)
        return torch.baddbmm(grad_BCK * root_BC1, left_BC3, right_B3K)


@full_precision
def graph_times(features_BCHW: Tensor, vectors_BCd: Tensor, weights: str = "shifted") -> Tensor:
    """Return ``S' U``, the graph without its trivial eigenpair applied to vectors.

    It is a chain of products with the rows of unit length: neither S' (C x C) nor a factor of it
    is formed.

    Args:
        features_BCHW: feature maps (B, C, H, W).
        vectors_BCd: U, vectors in columns (B, C, d).
        weights: "shifted" or "cosine", see ``normalised_factor``.

    Returns:
        (B, C, d).

    Raises:
        ConfigError: the weights are unknown.

    Source: [ours].
    """
    return rows_times(unit_rows(features_BCHW, weights), vectors_BCd, weights)


def unit_rows(features_BCHW: Tensor, weights: str) -> Tensor:
    """Return the rows X (B, C, N) whose products the weights of the graph are made of."""
    require(choice_problem("graph weights", weights, WEIGHTS))
    return normalised_channels(features_BCHW if weights == "shifted" else features_BCHW.relu())


def rows_times(rows_BCN: Tensor, vectors_BCd: Tensor, weights: str) -> Tensor:
    """Return ``graph_times`` of the rows that ``unit_rows`` gives."""
    # the column of ones in G, which is not written out
    shift = float(weights == "shifted")
    share = 1.0 / (1.0 + shift)
    vectors_BdC = vectors_BCd.mT.contiguous()
    sums_BC1 = (rows_BCN * rows_BCN.sum(1, keepdim=True)).sum(2, keepdim=True)
    root_BC1, trivial_BC1 = _scales((sums_BC1 + shift * rows_BCN.shape[1]) * share)
    root_B1C, trivial_B1C = root_BC1.mT, trivial_BC1.mT
    scaled_BdC = root_B1C * (vectors_BdC - (vectors_BdC @ trivial_BC1) * trivial_B1C)
    image_BdC = GramTimes.apply(scaled_BdC, rows_BCN) + shift * scaled_BdC.sum(2, keepdim=True)
    image_BdC = share * root_B1C * image_BdC
    return (image_BdC - (image_BdC @ trivial_BC1) * trivial_B1C).mT


def _scales(degrees_BC1: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``D^-1/2`` and the trivial eigenvector, both (B, C, 1) and 0 for isolated vertices."""
    isolated_BC1 = degrees_BC1 <= 0
    root_BC1 = degrees_BC1.masked_fill(isolated_BC1, 1.0).rsqrt().masked_fill(isolated_BC1, 0.0)
    volume_B11 = degrees_BC1.sum(1, keepdim=True)
    length_B11 = volume_B11.masked_fill(volume_B11 <= 0, 1.0).sqrt()
    return root_BC1, degrees_BC1 * root_BC1 / length_B11


def nontrivial_pairs(channels: int, positions: int, weights: str = "shifted") -> int:
    """Return min(C, K) - 1: how many non-zero eigenvalues the rank of the factor lets S' have."""
    return max(0, min(channels, _columns(positions, weights)) - 1)


@full_precision
def spectral_embedding(
    features_BCHW: Tensor, dim: int, weights: str = "shifted"
) -> tuple[Tensor, Tensor]:
    """Return the ``dim`` leading non-trivial eigenpairs of the normalised graph S.

    They are the ``dim`` smallest non-trivial ones of the normalised Laplacian I - S. A vector has
    no sign, and inside a repeated eigenvalue no direction: compare embeddings only by what does
    not depend on them. A null space has no preferred basis at all: pairs whose eigenvalue is zero
    to rounding, and those beyond the rank the factor can have (``nontrivial_pairs``), are returned
    as eigenvalue 0 with a zero vector, and have zero gradient.

    Args:
        features_BCHW: feature maps (B, C, H, W).
        dim: number of pairs d, from 1 to C - 1.
        weights: "shifted" or "cosine", see ``normalised_factor``.

    Returns:
        eigenvalues (B, d) in [0, 1], descending, and vectors (B, C, d) in columns of unit length.
        NaN, without an exception, for a sample that is not finite.

    Raises:
        ConfigError: dim is outside 1..C-1, or the weights are unknown.

    Source: [ours].
    """
    require(dimension_problem(dim, features_BCHW.shape[1]))
    factor_BCK = deflated_factor(features_BCHW, weights)
    small_BPK = _smaller_side_first(factor_BCK)
    values_Bd, vectors_BPd = GramEigen.apply(small_BPK, min(dim, small_BPK.shape[1]))
    return _leading(values_Bd, vectors_BPd, dim, factor_BCK.shape[1:], lambda: factor_BCK)


@full_precision
def graph_spectrum(features_BCHW: Tensor, weights: str = "shifted") -> tuple[Tensor, Tensor]:
    """Return the decomposition that the embeddings of every dimension are taken from.

    It is that of the smaller of ``M' M'^T`` and ``M'^T M'``; see ``embedding_from_spectrum``.

    Args:
        features_BCHW: feature maps (B, C, H, W).
        weights: "shifted" or "cosine", see ``normalised_factor``.

    Returns:
        eigenvalues (B, P), descending, and vectors (B, P, P) in columns, with P = min(C, K).

    Raises:
        ConfigError: the weights are unknown.

    Source: [ours].
    """
    small_BPK = _smaller_side_first(deflated_factor(features_BCHW, weights))
    return GramEigen.apply(small_BPK, small_BPK.shape[1])


@full_precision
def embedding_from_spectrum(
    features_BCHW: Tensor,
    spectrum_BP: Tensor,
    basis_BPP: Tensor,
    dim: int,
    weights: str = "shifted",
) -> tuple[Tensor, Tensor]:
    """Return ``spectral_embedding`` of maps whose ``graph_spectrum`` is known, bit for bit.

    Args:
        features_BCHW: feature maps (B, C, H, W).
        spectrum_BP: eigenvalues of ``graph_spectrum`` (B, P).
        basis_BPP: vectors of ``graph_spectrum`` (B, P, P).
        dim: number of pairs d, from 1 to C - 1.
        weights: those of the spectrum.

    Returns:
        eigenvalues (B, d) and vectors (B, C, d).

    Raises:
        ConfigError: dim is outside 1..C-1, or the weights are unknown.

    Source: [ours].
    """
    require(
        dimension_problem(dim, features_BCHW.shape[1]),
        choice_problem("graph weights", weights, WEIGHTS),
    )
    _, channels, height, width = features_BCHW.shape
    shape = channels, _columns(height * width, weights)
    # only the few columns of a graph of many channels are worked out again
    return _leading(
        spectrum_BP, basis_BPP, dim, shape, lambda: deflated_factor(features_BCHW, weights)
    )


def _columns(positions: int, weights: str) -> int:
    """Return K, the columns of the factor."""
    return positions + 1 if weights == "shifted" else positions


def _smaller_side_first(factor_BCK: Tensor) -> Tensor:
    channels, columns = factor_BCK.shape[1:]
    return factor_BCK if channels <= columns else factor_BCK.mT


def _leading(
    spectrum_BP: Tensor,
    basis_BPP: Tensor,
    dim: int,
    shape: Sequence[int],
    factor: Callable[[], Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the embedding that a decomposition of the smaller Gram matrix holds.

    Args:
        spectrum_BP: eigenvalues (B, P), descending.
        basis_BPP: vectors (B, P, P).
        dim: number of pairs d.
        shape: C and K of the factor.
        factor: returns the factor M' (B, C, K); it is called where C > K.
    """
    channels, columns = shape
    values_Bd, vectors_BPd = spectrum_BP[:, :dim], basis_BPP[:, :, :dim]

    # Rounding of a Gram matrix is relative to its largest eigenvalue; the second term is that of
    # the factor itself, all that is left of a complete graph.
    eps = torch.finfo(spectrum_BP.dtype).eps
    rounding_B1 = eps * max(channels, columns) * (spectrum_BP[:, :1].detach() + 100 * eps)
    null_Bd = values_Bd <= rounding_B1
    if channels <= columns:
        vectors_BCd = vectors_BPd
    else:
        vectors_BCd = factor() @ vectors_BPd
        vectors_BCd = vectors_BCd * values_Bd.masked_fill(null_Bd, 1.0).rsqrt()[:, None, :]
    missing = (0, dim - values_Bd.shape[1])
    return (
        F.pad(values_Bd.masked_fill(null_Bd, 0.0), missing),
        F.pad(vectors_BCd.masked_fill(null_Bd[:, None, :], 0.0), missing),
    )
