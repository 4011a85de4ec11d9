"""Eigendecomposition of many small matrices, on CPU threads.

Shape letters: B batch, P side of a square matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raygkd.accelerated.threads import each_on_a_thread, one_thread_each

# Larger matrices keep all LAPACK threads busy.
LARGEST_SMALL = 512
# A batch of matrices up to this size is solved before a second thread would have started.
LARGEST_TINY = 96
# Up to this size, a GPU solves a whole batch at once.
LARGEST_BATCHED = 32


def eigh(symmetric_BPP: Tensor) -> tuple[Tensor, Tensor]:
    """Return the result of ``torch.linalg.eigh``.

    That function solves the matrices of a batch one after another. On a CPU it uses all threads for
    each, which small matrices cannot keep busy; on a GPU, beyond 32 rows, it is several times
    slower than a CPU. Here, the matrices are distributed over the CPU's threads.
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
