"""Eigenproblems of many small matrices, on the threads of a CPU.

Shape letters: B batch, P side of a square matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raygkd.accelerated.threads import each_on_a_thread, one_thread_each

# matrices larger than this keep all threads of LAPACK busy, and up to this a batch of them is done
# before a second thread is
LARGEST_SMALL, LARGEST_TINY = 512, 96
# up to this side a GPU solves a whole batch at once
LARGEST_BATCHED = 32


def eigh(symmetric_BPP: Tensor) -> tuple[Tensor, Tensor]:
    """Return what ``torch.linalg.eigh`` does.

    That takes the matrices of a batch one after the other: on a CPU each with all threads, which a
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
