"""Leading eigenpairs by matrix products, for GPUs, which solve eigenproblems one after another.

Shape letters: B batch, P side of a square matrix, Q vectors of a basis.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from raygkd.accelerated.eigenproblems import LARGEST_BATCHED
from raygkd.graph.eigen import without_nonfinite

# The basis has as many vectors as a GPU can solve small eigenproblems for at once. Half of them
# are only there to make the other half converge.
LARGEST_COUNT = LARGEST_BATCHED // 2
# Powers of the matrix between two orthonormalisations, each with the share of the identity that is
# added to keep vectors of a null space from vanishing: a larger share until the vectors are in the
# order of their eigenvalues.
POWERS = ((1, 1e-7), (1, 1e-7), (4, 1e-12), (4, 1e-12), (4, 1e-12))


def leading_subspace(symmetric_BPP: Tensor) -> tuple[Tensor, Tensor]:
    """Return a basis of the leading eigenspace, and the matrix in that basis.

    This is subspace iteration in float64, where a Gram matrix can still orthonormalise vectors that
    the powers have made nearly parallel. An error shrinks by ``(l_(Q+1) / l_i)^14``: the residual
    is 1e-4 of the largest eigenvalue for the first eight pairs of a network's graph, and 2e-2 if
    the spectrum is flat.

    Args:
        symmetric_BPP: positive semidefinite matrices A (B, P, P), detached.

    Returns:
        orthonormal columns V (B, P, Q) and ``V^T A V`` (B, Q, Q) in the dtype of the matrices, with
        Q = min(P, 32). Eigenvectors of the second, multiplied by V, are those of A. The basis of a
        non-finite matrix is NaN.

    Source: [ours]; subspace iteration and Rayleigh-Ritz are textbook methods.
    """
    dtype, side = symmetric_BPP.dtype, symmetric_BPP.shape[1]
    matrix_BPP, nonfinite_B11 = without_nonfinite(symmetric_BPP)
    if side <= LARGEST_BATCHED:
        basis_BPQ = torch.eye(side, dtype=dtype, device=matrix_BPP.device).expand_as(matrix_BPP)
        return basis_BPQ.masked_fill(nonfinite_B11, torch.nan), matrix_BPP
    matrix_BPP = matrix_BPP.double()
    scale_B11 = torch.linalg.matrix_norm(matrix_BPP, keepdim=True)
    scaled_BPP = matrix_BPP / scale_B11.clamp_min(torch.finfo(torch.float64).tiny)
    basis_BPQ = _start(side, matrix_BPP.device).expand(len(matrix_BPP), -1, -1)
    for power, share in POWERS:
        image_BPQ = basis_BPQ
        for _ in range(power):
            image_BPQ = scaled_BPP @ image_BPQ
        basis_BPQ = _orthonormal(image_BPQ.add(basis_BPQ, alpha=share))
    basis_BPQ = _orthonormal(basis_BPQ)
    ritz_BQQ = basis_BPQ.mT @ (matrix_BPP @ basis_BPQ)
    return basis_BPQ.to(dtype).masked_fill(nonfinite_B11, torch.nan), ritz_BQQ.to(dtype)


def _orthonormal(vectors_BPQ: Tensor) -> Tensor:
    """Orthonormalise columns by the Cholesky factor of their Gram matrix."""
    limits = torch.finfo(vectors_BPQ.dtype)
    lengths_B1Q = torch.linalg.vector_norm(vectors_BPQ, dim=1, keepdim=True)
    unit_BPQ = vectors_BPQ / lengths_B1Q.clamp_min(limits.tiny)
    products_BQQ = unit_BPQ.mT @ unit_BPQ
    # keeps the matrix positive definite despite rounding
    products_BQQ.diagonal(dim1=1, dim2=2).add_(2 * LARGEST_BATCHED * limits.eps)
    factor_BQQ, _ = torch.linalg.cholesky_ex(products_BQQ)
    return torch.linalg.solve_triangular(factor_BQQ.mT, unit_BPQ, upper=True, left=False)


@functools.cache
def _start(side: int, device: torch.device) -> Tensor:
    """Return fixed random vectors (P, Q)."""
    generator = torch.Generator().manual_seed(0)
    shape = (side, LARGEST_BATCHED)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
