"""Eigenpairs of symmetric matrices, with a gradient that is always finite.

Shape letters: B batch, P side of a square matrix, d eigenpairs, V batches of a ``torch.vmap``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from raygkd.graph.precision import full_precision

# symmetric matrices (B, P, P) -> eigenvalues (B, P), ascending, and vectors (B, P, P) in columns
Eigh = Callable[[Tensor], tuple[Tensor, Tensor]]


def leading_pairs(
    symmetric_BPP: Tensor, count: int, eigh: Eigh = torch.linalg.eigh
) -> tuple[Tensor, Tensor]:
    """Return the leading eigenpairs of symmetric matrices, see ``LeadingPairs``.

    Args:
        symmetric_BPP: matrices; only their lower triangles are read.
        count: number of pairs d, from 1 to P.
        eigh: solver for the full eigenproblem.

    Returns:
        eigenvalues (B, d), descending, and vectors (B, P, d) in columns.
    """
    values_Bd, vectors_BPd, _, _ = LeadingPairs.apply(symmetric_BPP, count, eigh)
    return values_Bd, vectors_BPd


class LeadingPairs(torch.autograd.Function):
    """Leading eigenpairs of symmetric matrices, descending, with a gradient that is always finite.

    The gradient of an eigenvector contains reciprocals of the gaps ``D = l_j - l_i``, which are
    infinite for repeated eigenvalues. They are replaced by ``D^3 / (D^4 + e^4)`` with
    ``e = sqrt(eps) max|l|``: zero at D = 0, never above 0.6 / e, with a relative error below
    ``(e / D)^4``. A non-finite matrix gives NaN, where LAPACK would raise, so that every process
    sees a diverged run in the loss.

    Source: [ours]; the exact derivative is textbook perturbation theory.
    """

    @staticmethod
    def forward(
        symmetric_BPP: Tensor, count: int, eigh: Eigh
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return ``leading_pairs``, followed by all pairs as returned by ``eigh``."""
        finite_BPP, nonfinite_B11 = without_nonfinite(symmetric_BPP)
        spectrum_BP, basis_BPP = eigh(finite_BPP)
        values_Bd = spectrum_BP.flip(1)[:, :count].masked_fill(nonfinite_B11[:, :, 0], math.nan)
        vectors_BPd = basis_BPP[:, :, -count:].flip(2).masked_fill(nonfinite_B11, math.nan)
        return values_Bd, vectors_BPd, spectrum_BP, basis_BPP

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, int, Eigh], output: tuple[Tensor, ...]
    ) -> None:
        """Save all pairs for the backward pass."""
        ctx.save_for_backward(*output)
        # only a second derivative needs the gradient of all pairs
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        """Return ``(Y V^T + V Y^T) / 2`` (B, P, P), for eigenvectors V and a factor Y of each."""
        leading, all_pairs = ctx.saved_tensors[:2], ctx.saved_tensors[2:]
        products = [
            _symmetric_product(*pairs, *pair_gradients, *all_pairs)
            for pairs, pair_gradients in ((leading, gradients[:2]), (all_pairs, gradients[2:]))
            if any(gradient is not None for gradient in pair_gradients)
        ]
        return (sum(products[1:], products[0]) if products else None), None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], symmetric: Tensor, count: int, eigh: Eigh
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Return the pairs of several batches (V, B, ...), flattened into one batch."""
        assert in_dims[0] is not None
        symmetric_VBPP = symmetric.movedim(in_dims[0], 0)
        pairs = LeadingPairs.apply(symmetric_VBPP.flatten(0, 1), count, eigh)
        return tuple(part.unflatten(0, symmetric_VBPP.shape[:2]) for part in pairs), (0,) * 4


@full_precision
def _symmetric_product(
    values_Bd: Tensor,
    vectors_BPd: Tensor,
    grad_values_Bd: Tensor | None,
    grad_vectors_BPd: Tensor | None,
    spectrum_BP: Tensor,
    basis_BPP: Tensor,
) -> Tensor:
    """Return the contribution of some eigenpairs to the gradient of the matrix (B, P, P)."""
    vectors_BdP = vectors_BPd.mT
    factors_BdP = torch.zeros_like(vectors_BdP)
    if grad_vectors_BPd is not None:
        eps = torch.finfo(values_Bd.dtype).eps
        scale_B11 = spectrum_BP.detach().abs().amax(1)[:, None, None].clamp_min(eps**2)
        gaps_BdP = (values_Bd[:, :, None] - spectrum_BP[:, None, :]) / scale_B11
        cubes_BdP = gaps_BdP * gaps_BdP * gaps_BdP
        reciprocal_BdP = cubes_BdP / (cubes_BdP * gaps_BdP + eps**2) / scale_B11
        factors_BdP = reciprocal_BdP * (grad_vectors_BPd.mT @ basis_BPP) @ basis_BPP.mT
    if grad_values_Bd is not None:
        factors_BdP = factors_BdP + grad_values_Bd[:, :, None] * vectors_BdP
    left_BdP = torch.cat([factors_BdP, vectors_BdP], 1)
    right_BdP = torch.cat([vectors_BdP, factors_BdP], 1) / 2
    return left_BdP.mT @ right_BdP


def without_nonfinite(matrix_BPP: Tensor) -> tuple[Tensor, Tensor]:
    """Return matrices with non-finite entries set to 0, and a mask of those affected (B, 1, 1)."""
    # a non-finite entry makes the sum of its row non-finite
    nonfinite_B11 = ~matrix_BPP.sum(2).isfinite().all(1)[:, None, None]
    return matrix_BPP.nan_to_num(0.0, 0.0, 0.0), nonfinite_B11
