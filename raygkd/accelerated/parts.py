"""Sums over the samples of a batch that is processed in parts.

Shape letters: B batch, C channels, O channels of the teacher, H height, W width, T terms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raygkd.accelerated.threads import each_on_a_thread
from raygkd.graph.precision import full_precision

# maps of a part (b, C, H, W) and shared tensors -> terms (T,), summed over the part's samples
Terms = Callable[..., Tensor]
# Size of a part's maps, of which about ten copies are alive. Smaller parts would leave a GPU idle.
PART_BYTES, GPU_PART_BYTES = 1 << 21, 1 << 25
# tolerance when a gradient is compared with a multiple of the weights, in units of eps
ROUNDING = 16


class SumOverParts(torch.autograd.Function):
    """Terms of a batch, summed over its parts.

    Intermediate results of a part are several times the size of its maps, so they are not saved.
    If the weights of the terms are known in advance, the gradient of their weighted sum is computed
    in the forward pass; if not, the backward pass processes the parts again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        parts: Sequence[Terms],
        size: int,
        weights: Sequence[float] | None,
        maps_BCHW: Tensor,
        *shared: Tensor,
    ) -> Tensor:
        """Return the terms (T,).

        Args:
            parts: for each part, the function that returns its terms; each runs on its own thread.
            size: number of samples in a part.
            weights: weights of the terms, none of them 0, if the terms will only be summed with a
                multiple of these weights; None otherwise.
            maps_BCHW: maps of the batch.
            shared: tensors passed to every part besides its maps.
        """
        ctx.weights, needed = weights, ctx.needs_input_grad[3:]
        if weights is None:
            ctx.parts, ctx.size = parts, size
            ctx.save_for_backward(maps_BCHW, *shared)
            return _sum_parts(parts, size, [False] * len(needed), None, maps_BCHW, *shared)[0]
        weights_T = filled(maps_BCHW, weights)
        terms_T, ctx.gradients = _sum_parts(parts, size, needed, weights_T, maps_BCHW, *shared)
        return terms_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the maps and of the shared tensors.

        Raises:
            RuntimeError: the gradient is not a multiple of the weights, or backward ran before.
        """
        if ctx.weights is None:
            needed = ctx.needs_input_grad[3:]
            _, gradients = _sum_parts(ctx.parts, ctx.size, needed, grad_T, *ctx.saved_tensors)
            return None, None, None, *gradients
        if ctx.gradients is None:
            raise RuntimeError("terms that were computed with their gradient allow one backward")
        ratio = common_ratio(grad_T, ctx.weights)
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, None, *(None if grad is None else grad.mul_(ratio) for grad in gradients)


def part_size(maps: Tensor) -> int:
    """Return how many samples of the maps (B, ...) the losses process at a time."""
    limit = GPU_PART_BYTES if maps.is_cuda else PART_BYTES
    return max(1, limit // max(1, maps[0].nbytes))


def filled(reference: Tensor, values: Sequence[float]) -> Tensor:
    """Return numbers as a tensor (T,) with the dtype and device of a reference tensor.

    No data is copied from the CPU to a GPU.
    """
    return torch.stack([reference.new_full((), value) for value in values])


def common_ratio(grad_T: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the scalar by which the weights are multiplied in the gradient of the terms.

    Raises:
        RuntimeError: the gradient is not a multiple of the weights; on a GPU, raised at the next
            synchronisation.
    """
    ratios_T = grad_T / filled(grad_T, weights)
    spread = ratios_T.amax() - ratios_T.amin()
    limit = ROUNDING * torch.finfo(grad_T.dtype).eps * ratios_T[0].abs()
    # a non-finite gradient passes: it is reported as a non-finite loss
    torch._assert_async(
        ~(spread > limit), "the terms' gradient was computed with different weights"
    )
    return ratios_T[0]


# outside autocast, which would also affect the gradients
@full_precision
def _sum_parts(
    parts: Sequence[Terms],
    size: int,
    needed: Sequence[bool],
    weights_T: Tensor | None,
    maps_BCHW: Tensor,
    *shared: Tensor,
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the summed terms, and the needed gradients of their weighted sum."""
    gradient_BCHW = torch.empty_like(maps_BCHW) if needed[0] else None
    targets = [None] * len(parts) if gradient_BCHW is None else gradient_BCHW.split(size)
    function = functools.partial(_part_terms, needed, weights_T, shared)
    items = list(zip(parts, maps_BCHW.split(size), targets, strict=True))
    # other threads would use other streams of a GPU
    results = list(map(function, items)) if maps_BCHW.is_cuda else each_on_a_thread(function, items)
    terms, gradients = zip(*results, strict=True)
    shared_gradients = [
        torch.stack(summands).sum(0) if is_needed else None
        for is_needed, summands in zip(needed[1:], zip(*gradients, strict=True), strict=True)
    ]
    return torch.stack(terms).sum(0), [gradient_BCHW, *shared_gradients]


def _part_terms(
    needed: Sequence[bool],
    weights_T: Tensor | None,
    shared: Sequence[Tensor],
    part: tuple[Terms, Tensor, Tensor | None],
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the terms of one part (T,), and the gradients of the shared tensors.

    The gradient of the part's maps is written to its place in the batch.
    """
    terms_of, maps_bCHW, target_bCHW = part
    with torch.set_grad_enabled(any(needed)):
        inputs = [
            tensor.detach().requires_grad_(is_needed)
            for tensor, is_needed in zip((maps_bCHW, *shared), needed, strict=True)
        ]
        terms_T = terms_of(*inputs)
    trainable = [tensor for tensor in inputs if tensor.requires_grad]
    gradients = iter(torch.autograd.grad(terms_T, trainable, weights_T) if trainable else ())
    if target_bCHW is not None:
        target_bCHW.copy_(next(gradients))
    shared_gradients = [next(gradients) if is_needed else None for is_needed in needed[1:]]
    return terms_T.detach(), shared_gradients
