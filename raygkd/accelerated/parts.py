"""Sums over the samples of a batch that is taken in parts.

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

# of a part's maps (b, C, H, W) and what all parts share -> its terms (T,), summed over its samples
Terms = Callable[..., Tensor]
# the maps of a part of a batch, of which some ten copies are alive; smaller ones leave a GPU idle
PART_BYTES, GPU_PART_BYTES = 1 << 21, 1 << 25
# how far a gradient may be from a multiple of the weights, in units of eps
ROUNDING = 16


class SumOverParts(torch.autograd.Function):
    """Terms of a batch, summed over its parts.

    What follows from a part's maps is several times their size, so nothing of it is kept. Where the
    weights that the terms will have are known, the gradient of their weighted sum is taken with
    them; where not, the parts are taken once more on the way back.
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
            parts: for each part, what gives its terms; each runs on a thread of its own.
            size: samples of a part.
            weights: of the terms, none of them 0, where any multiple of these is all that they
                will be summed with; None where others are possible.
            maps_BCHW: of the batch.
            shared: what every part is given besides its maps.
        """
        ctx.weights, needed = weights, ctx.needs_input_grad[3:]
        if weights is None:
            ctx.parts, ctx.size = parts, size
            ctx.save_for_backward(maps_BCHW, *shared)
            return _over_parts(parts, size, [False] * len(needed), None, maps_BCHW, *shared)[0]
        weights_T = filled(maps_BCHW, weights)
        terms_T, ctx.gradients = _over_parts(parts, size, needed, weights_T, maps_BCHW, *shared)
        return terms_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of maps and of what is shared.

        Raises:
            RuntimeError: the gradient is no multiple of the weights, or it is asked for again.
        """
        if ctx.weights is None:
            needed = ctx.needs_input_grad[3:]
            _, found = _over_parts(ctx.parts, ctx.size, needed, grad_T, *ctx.saved_tensors)
            return None, None, None, *found
        if ctx.gradients is None:
            raise RuntimeError("a gradient that was taken with the terms is there only once")
        ratio = common_ratio(grad_T, ctx.weights)
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, None, *(None if grad is None else grad.mul_(ratio) for grad in gradients)


def part_size(maps: Tensor) -> int:
    """Return how many samples of a batch the losses take at a time, of maps (B, ...)."""
    most = GPU_PART_BYTES if maps.is_cuda else PART_BYTES
    return max(1, most // max(1, maps[0].nbytes))


def filled(like: Tensor, values: Sequence[float]) -> Tensor:
    """Return numbers as a tensor (T,) of another's dtype and device, without a copy to a GPU."""
    return torch.stack([like.new_full((), value) for value in values])


def common_ratio(grad_T: Tensor, weights: Sequence[float]) -> Tensor:
    """Return what the gradient of terms is a multiple of their weights by, a scalar.

    Raises:
        RuntimeError: it is no multiple of them; on a GPU later, from whatever waits for it.
    """
    ratios_T = grad_T / filled(grad_T, weights)
    spread = ratios_T.amax() - ratios_T.amin()
    limit = ROUNDING * torch.finfo(grad_T.dtype).eps * ratios_T[0].abs()
    # what is not finite is told as the loss that it makes
    torch._assert_async(
        ~(spread > limit), "the terms have other weights than their gradient was taken with"
    )
    return ratios_T[0]


# outside autocast, which would be on in the gradients, too
@full_precision
def _over_parts(
    parts: Sequence[Terms],
    size: int,
    needed: Sequence[bool],
    weights_T: Tensor | None,
    maps_BCHW: Tensor,
    *shared: Tensor,
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the summed terms, and those gradients of their weighted sum that are needed."""
    gradient_BCHW = torch.empty_like(maps_BCHW) if needed[0] else None
    targets = [None] * len(parts) if gradient_BCHW is None else gradient_BCHW.split(size)
    work = functools.partial(_of_part, needed, weights_T, shared)
    items = list(zip(parts, maps_BCHW.split(size), targets, strict=True))
    # other threads of a process have other streams of a GPU
    found = list(map(work, items)) if maps_BCHW.is_cuda else each_on_a_thread(work, items)
    terms, gradients = zip(*found, strict=True)
    of_shared = [
        torch.stack(summands).sum(0) if is_needed else None
        for is_needed, summands in zip(needed[1:], zip(*gradients, strict=True), strict=True)
    ]
    return torch.stack(terms).sum(0), [gradient_BCHW, *of_shared]


def _of_part(
    needed: Sequence[bool],
    weights_T: Tensor | None,
    shared: Sequence[Tensor],
    part: tuple[Terms, Tensor, Tensor | None],
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the terms of one part (T,), and the gradients of what is shared.

    That of the part's maps is written where it belongs.
    """
    terms_of, maps_bCHW, target_bCHW = part
    with torch.set_grad_enabled(any(needed)):
        inputs = [
            tensor.detach().requires_grad_(is_needed)
            for tensor, is_needed in zip((maps_bCHW, *shared), needed, strict=True)
        ]
        terms_T = terms_of(*inputs)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    gradients = iter(torch.autograd.grad(terms_T, wanted, weights_T) if wanted else ())
    if target_bCHW is not None:
        target_bCHW.copy_(next(gradients))
    of_shared = [next(gradients) if is_needed else None for is_needed in needed[1:]]
    return terms_T.detach(), of_shared
