"""Leading eigenpairs by products alone, for a GPU, which takes eigenproblems one after the other.

Shape letters: B batch, P side of a square matrix, Q vectors of a basis.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from raygkd.accelerated.eigenproblems import LARGEST_BATCHED
from raygkd.graph.eigen import without_broken

# as many vectors are turned as leave eigenproblems that a GPU solves at once; half of them are
# there for the other half to converge
LARGEST_COUNT = LARGEST_BATCHED // 2
# Powers of the matrix between two orthonormalisations, each with the share of the identity that is
# added so that vectors of a null space do not vanish: more of it as long as the vectors are not in
# the order of their eigenvalues.
POWERS = ((1, 1e-7), (1, 1e-7), (4, 1e-12), (4, 1e-12), (4, 1e-12))


def leading_subspace(symmetric_BPP: Tensor) -> tuple[Tensor, Tensor]:
    """Return a basis of the leading eigenvectors, and the matrix in it.

    Subspace iteration in float64, where a Gram matrix still orthonormalises what powers have nearly
    made parallel. An error falls by ``(l_(Q+1) / l_i)^14``: a residual of 1e-4 of the largest
    eigenvalue for the first eight of a network's graph, 2e-2 where a spectrum is flat.

    Args:
        symmetric_BPP: positive semidefinite matrices (B, P, P), without gradient.

    Returns:
        orthonormal columns (B, P, Q) and ``V^T A V`` (B, Q, Q) in the dtype of the matrices, with Q
        = min(P, 32): the eigenpairs of the second, turned by the first, are those of A. The basis
        of a matrix that is not finite is NaN.

    Source: [ours]; subspace iteration and Rayleigh-Ritz are textbook methods.
    """
    dtype, side = symmetric_BPP.dtype, symmetric_BPP.shape[1]
    matrix_BPP, broken_B11 = without_broken(symmetric_BPP)
    if side <= LARGEST_BATCHED:
        basis_BPQ = torch.eye(side, dtype=dtype, device=matrix_BPP.device).expand_as(matrix_BPP)
        return basis_BPQ.masked_fill(broken_B11, torch.nan), matrix_BPP
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
    return basis_BPQ.to(dtype).masked_fill(broken_B11, torch.nan), ritz_BQQ.to(dtype)


def _orthonormal(vectors_BPQ: Tensor) -> Tensor:
    """Return the Gram-Schmidt basis of columns, by the Cholesky factor of their products."""
    limits = torch.finfo(vectors_BPQ.dtype)
    lengths_B1Q = torch.linalg.vector_norm(vectors_BPQ, dim=1, keepdim=True)
    unit_BPQ = vectors_BPQ / lengths_B1Q.clamp_min(limits.tiny)
    products_BQQ = unit_BPQ.mT @ unit_BPQ
    # so that rounding cannot make it indefinite
    products_BQQ.diagonal(dim1=1, dim2=2).add_(2 * LARGEST_BATCHED * limits.eps)
    factor_BQQ, _ = torch.linalg.cholesky_ex(products_BQQ)
    return torch.linalg.solve_triangular(factor_BQQ.mT, unit_BPQ, upper=True, left=False)


@functools.cache
def _start(side: int, device: torch.device) -> Tensor:
    """Return the same random vectors (P, Q) every time."""
    generator = torch.Generator().manual_seed(0)
    shape = (side, LARGEST_BATCHED)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
