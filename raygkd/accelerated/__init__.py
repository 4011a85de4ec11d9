"""What makes the graph losses fast, and changes nothing of what they are.

``raygkd.losses.GraphDistillationLoss`` takes all of it or, with ``accelerated=False``, none. A test
holds its values and gradients to those of the plain way.

The loss calls ``backend``: ``fast_operators`` has gradients written by hand (``products``,
``deflation``) and eigenproblems on threads (``eigenproblems``, ``threads``); ``parts`` takes a
batch in parts; ``replayed`` is for a GPU, with CUDA graphs (``captured``) and leading eigenpairs by
products (``subspace``).
"""

from raygkd.accelerated.backend import AcceleratedBackend
from raygkd.accelerated.fast_operators import FAST

__all__ = ["FAST", "AcceleratedBackend"]
