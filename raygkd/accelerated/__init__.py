"""Faster implementation of the graph losses, with the same results.

``raygkd.losses.GraphDistillationLoss`` uses it unless ``accelerated=False``. Tests compare its
values and gradients with those of the reference implementation.

The loss calls ``backend``. ``fast_operators`` has hand-written gradients (``products``,
``deflation``) and solves eigenproblems on threads (``eigenproblems``, ``threads``); ``parts``
processes a batch in parts; ``replayed`` is for GPUs, with CUDA graphs (``captured``) and leading
eigenpairs by subspace iteration (``subspace``).
"""

from raygkd.accelerated.backend import AcceleratedBackend
from raygkd.accelerated.fast_operators import FAST

__all__ = ["FAST", "AcceleratedBackend"]
