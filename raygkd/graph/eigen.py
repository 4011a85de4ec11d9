"""Eigenpairs of many small symmetric matrices.

Shape letters: B batch, P side of a square matrix.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raygkd.graph.precision import full_precision

# matrices larger than this keep all threads of LAPACK busy
LARGEST_SMALL = 512


class SymmetricEigen(torch.autograd.Function):
    """All eigenpairs of symmetric matrices, descending, with a gradient that is always finite.

    The gradient of a vector holds the reciprocals of the gaps ``D = l_j - l_i``, which are infinite
    in a repeated eigenvalue. They are replaced by ``D^3 / (D^4 + e^4)`` with
    ``e = sqrt(eps) max|l|``: zero at D = 0, never above 0.6 / e, and within ``(e / D)^4`` of 1 / D
    relative to it. A matrix that is not finite gives NaN, where LAPACK would raise, so that a
    diverged run is noticed in the loss on every process alike.

    Source: [ours]; the exact derivative is textbook perturbation theory.
    """

    @staticmethod
    def forward(ctx: Any, matrix_BPP: Tensor) -> tuple[Tensor, Tensor]:
        """Return eigenvalues (B, P) and vectors (B, P, P) of the symmetric part of the matrices."""
        symmetric_BPP = (matrix_BPP + matrix_BPP.mT) / 2
        broken_B11 = ~symmetric_BPP.isfinite().all(2, keepdim=True).all(1, keepdim=True)
        values_BP, vectors_BPP = _eigh(symmetric_BPP.masked_fill(broken_B11, 0.0))
        values_BP = values_BP.flip(1).masked_fill(broken_B11[:, :, 0], math.nan)
        vectors_BPP = vectors_BPP.flip(2).masked_fill(broken_B11, math.nan)
        ctx.save_for_backward(values_BP, vectors_BPP)
        return values_BP, vectors_BPP

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx: Any, grad_values_BP: Tensor, grad_vectors_BPP: Tensor) -> Tensor:
        """Return the gradient (B, P, P) of the matrices, which is symmetric."""
        values_BP, vectors_BPP = ctx.saved_tensors
        eps = torch.finfo(values_BP.dtype).eps
        scale_B11 = values_BP.abs().amax(1)[:, None, None].clamp_min(eps**2)
        gaps_BPP = (values_BP[:, None, :] - values_BP[:, :, None]) / scale_B11
        reciprocal_BPP = gaps_BPP**3 / (gaps_BPP**4 + eps**2) / scale_B11
        turn_BPP = vectors_BPP.mT @ grad_vectors_BPP
        inner_BPP = reciprocal_BPP * (turn_BPP - turn_BPP.mT) / 2 + grad_values_BP.diag_embed()
        return vectors_BPP @ inner_BPP @ vectors_BPP.mT


def _eigh(symmetric_BPP: Tensor) -> tuple[Tensor, Tensor]:
    """Return what ``torch.linalg.eigh`` does.

    It takes the matrices of a batch one after the other, each with all threads of the CPU, which a
    small one has no work for: their waiting for each other took up to 50 times as long as the work
    (128 x 128, two cores that other processes use too). So each thread gets matrices of its own.
    """
    threads = torch.get_num_threads()
    batch, side = symmetric_BPP.shape[:2]
    if symmetric_BPP.device.type != "cpu" or threads == 1 or side > LARGEST_SMALL:
        return torch.linalg.eigh(symmetric_BPP)
    with _one_thread_each(threads):
        parts = _pool(threads).map(torch.linalg.eigh, symmetric_BPP.chunk(min(threads, batch)))
        pairs = list(parts)
    return torch.cat([values for values, _ in pairs]), torch.cat([vectors for _, vectors in pairs])


@contextlib.contextmanager
def _one_thread_each(threads: int) -> Iterator[None]:
    """Keep torch and LAPACK at one thread for each thread that calls them."""
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(
        threads, thread_name_prefix="eigh", initializer=torch.set_num_threads, initargs=(1,)
    )


# a child process has the pool, but not its threads
os.register_at_fork(after_in_child=_pool.cache_clear)
