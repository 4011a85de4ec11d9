"""Eigenpairs of many small symmetric matrices.

Shape letters: B batch, P side of a square matrix.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raygkd.graph.precision import full_precision
from raygkd.graph.threads import each_on_a_thread, one_thread_each

# matrices larger than this keep all threads of LAPACK busy, and up to this a batch of them is done
# before a second thread is
LARGEST_SMALL, LARGEST_TINY = 512, 96
# up to this side a GPU solves a whole batch at once
LARGEST_BATCHED = 32


class LeadingPairs(torch.autograd.Function):
    """Leading eigenpairs of symmetric matrices, descending, with a gradient that is always finite.

    The gradient of a vector holds the reciprocals of the gaps ``D = l_j - l_i``, which are infinite
    in a repeated eigenvalue. They are replaced by ``D^3 / (D^4 + e^4)`` with
    ``e = sqrt(eps) max|l|``: zero at D = 0, never above 0.6 / e, and within ``(e / D)^4`` of 1 / D
    relative to it. A matrix that is not finite gives NaN, where LAPACK would raise, so that a
    diverged run is noticed in the loss on every process alike.

    Source: [ours]; the exact derivative is textbook perturbation theory.
    """

    @staticmethod
    def forward(ctx: Any, symmetric_BPP: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return eigenvalues (B, d) and vectors (B, P, d) for a count d of them, 1 to P."""
        finite_BPP, broken_B11 = without_broken(symmetric_BPP)
        spectrum_BP, basis_BPP = _eigh(finite_BPP)
        values_Bd = spectrum_BP.flip(1)[:, :count].masked_fill(broken_B11[:, :, 0], math.nan)
        vectors_BPd = basis_BPP[:, :, -count:].flip(2).masked_fill(broken_B11, math.nan)
        ctx.save_for_backward(spectrum_BP, basis_BPP, values_Bd, vectors_BPd)
        return values_Bd, vectors_BPd

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx: Any, grad_values_Bd: Tensor, grad_vectors_BPd: Tensor) -> tuple[Tensor, None]:
        """Return ``(Y V^T + V Y^T) / 2`` (B, P, P), for the vectors V and as many others Y."""
        spectrum_BP, basis_BPP, values_Bd, vectors_BPd = ctx.saved_tensors
        eps = torch.finfo(values_Bd.dtype).eps
        scale_B11 = spectrum_BP.abs().amax(1)[:, None, None].clamp_min(eps**2)
        gaps_BdP = (values_Bd[:, :, None] - spectrum_BP[:, None, :]) / scale_B11
        cubes_BdP = gaps_BdP * gaps_BdP * gaps_BdP
        reciprocal_BdP = cubes_BdP / (cubes_BdP * gaps_BdP + eps**2) / scale_B11
        turns_BdP = reciprocal_BdP * (grad_vectors_BPd.mT @ basis_BPP)
        vectors_BdP = vectors_BPd.mT
        others_BdP = turns_BdP @ basis_BPP.mT + grad_values_Bd[:, :, None] * vectors_BdP
        left_BdP = torch.cat([others_BdP, vectors_BdP], 1)
        right_BdP = torch.cat([vectors_BdP, others_BdP], 1) / 2
        return left_BdP.mT @ right_BdP, None


def without_broken(matrix_BPP: Tensor) -> tuple[Tensor, Tensor]:
    """Return matrices without what is not finite, and which had something of it (B, 1, 1)."""
    # a sum is finite only where all of its summands are
    broken_B11 = ~matrix_BPP.sum(2).isfinite().all(1)[:, None, None]
    return matrix_BPP.nan_to_num(0.0, 0.0, 0.0), broken_B11


def _eigh(symmetric_BPP: Tensor) -> tuple[Tensor, Tensor]:
    """Return what ``torch.linalg.eigh`` does.

    It takes the matrices of a batch one after the other: on a CPU each with all threads, which a
    small one has no work for, and on a GPU, beyond 32 rows, several times as slowly as a CPU. So
    each thread of the CPU gets matrices of its own.
    """
    side, device = symmetric_BPP.shape[1], symmetric_BPP.device
    if side > LARGEST_SMALL or (device.type != "cpu" and side <= LARGEST_BATCHED):
        return torch.linalg.eigh(symmetric_BPP)
    if device.type != "cpu":
        values_BP, vectors_BPP = _on_threads(symmetric_BPP.cpu())
        return values_BP.to(device), vectors_BPP.to(device)
    if side <= LARGEST_TINY:
        with one_thread_each():
            return torch.linalg.eigh(symmetric_BPP)
    return _on_threads(symmetric_BPP)


def _on_threads(symmetric_BPP: Tensor) -> tuple[Tensor, Tensor]:
    parts = symmetric_BPP.chunk(min(torch.get_num_threads(), len(symmetric_BPP)))
    pairs = each_on_a_thread(torch.linalg.eigh, parts)
    return torch.cat([values for values, _ in pairs]), torch.cat([vectors for _, vectors in pairs])
