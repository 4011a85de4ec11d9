"""Products with the rows of a factor, with gradients in the fewest passes.

Shape letters: B batch, C channels, N positions, d vectors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raygkd.graph.operators import largest_magnitude


class UnitRows(torch.autograd.Function):
    """Rows divided by their Euclidean norms; a dead row becomes zero, and so does its gradient.

    A row is dead when its norm is at most eps(dtype) times the largest norm in the same matrix.
    """

    @staticmethod
    def forward(ctx: Any, maps_BCN: Tensor) -> Tensor:
        """Return the rows (B, C, N)."""
        limits = torch.finfo(maps_BCN.dtype)
        # Scaling does not change the result, and keeps squares from over- or underflowing.
        amplitude_B11 = largest_magnitude(maps_BCN, (1, 2))
        amplitude_B11 = amplitude_B11.masked_fill(amplitude_B11 < limits.tiny, 1.0)
        rows_BCN = maps_BCN / amplitude_B11
        lengths_BC1 = torch.linalg.vector_norm(rows_BCN, dim=2, keepdim=True)
        # "<=" is false for NaN, so that NaN reaches the loss and is noticed.
        dead_BC1 = lengths_BC1 <= limits.eps * lengths_BC1.amax(1, keepdim=True)
        scales_BC1 = lengths_BC1.masked_fill(dead_BC1, 1.0).reciprocal().masked_fill(dead_BC1, 0.0)
        rows_BCN *= scales_BC1
        ctx.save_for_backward(rows_BCN, scales_BC1 / amplitude_B11)
        return rows_BCN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BCN: Tensor) -> Tensor:
        """Return the component of the gradient orthogonal to each row, divided by its norm."""
        rows_BCN, scales_BC1 = ctx.saved_tensors
        along_BC1 = (grad_BCN * rows_BCN).sum(2, keepdim=True)
        return torch.addcmul(grad_BCN, rows_BCN, along_BC1, value=-1.0).mul_(scales_BC1)


class Gram(torch.autograd.Function):
    """``X X^T``."""

    @staticmethod
    def forward(ctx: Any, rows_BCN: Tensor) -> Tensor:
        """Return (B, C, C)."""
        ctx.save_for_backward(rows_BCN)
        return rows_BCN @ rows_BCN.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BCC: Tensor) -> Tensor:
        """Return ``(G + G^T) X``."""
        (rows_BCN,) = ctx.saved_tensors
        return (grad_BCC + grad_BCC.mT) @ rows_BCN


class Covariance(torch.autograd.Function):
    """Mean and covariance of the channels over samples and positions."""

    @staticmethod
    def forward(ctx: Any, maps_BCN: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Return the mean (C,) and ``mean_{b,n} (x - mean) (x - mean)^T`` (C, C).

        The mean is subtracted first: the difference of second moments loses all precision where a
        channel's mean is large compared with its standard deviation.

        Args:
            maps_BCN: channels of a batch.
            size: number of samples whose products are in memory at a time.
        """
        batch, _, positions = maps_BCN.shape
        mean_C = maps_BCN.mean((0, 2))
        centred = (part - mean_C[:, None] for part in maps_BCN.split(size))
        sums = [(part @ part.mT).sum(0) for part in centred]
        ctx.save_for_backward(maps_BCN, mean_C)
        return mean_C, torch.stack(sums).sum(0) / (batch * positions)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_C: Tensor, grad_CC: Tensor) -> tuple[Tensor, None]:
        """Return ``(g + (G + G^T) (x - mean)) / (B N)`` for each vector x."""
        maps_BCN, mean_C = ctx.saved_tensors
        batch, _, positions = maps_BCN.shape
        turn_CC = (grad_CC + grad_CC.mT) / (batch * positions)
        shift_C = grad_C / (batch * positions) - turn_CC @ mean_C
        shift_BCN = shift_C[:, None].expand(batch, -1, positions)
        return torch.baddbmm(shift_BCN, turn_CC.expand(batch, -1, -1), maps_BCN), None


class WeightedSquares(torch.autograd.Function):
    """``sum_n w_n (s x_n - y_n)^2`` of each row; only x has a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_BCN: Tensor,
        targets_BCN: Tensor,
        weights_BN1: Tensor,
        scale_B11: Tensor | None,
    ) -> Tensor:
        """Return (B, C).

        Args:
            rows_BCN: x.
            targets_BCN: y.
            weights_BN1: w.
            scale_B11: s; None for 1.
        """
        if scale_B11 is None:
            difference_BCN = rows_BCN - targets_BCN
        else:
            difference_BCN = (rows_BCN * scale_B11).sub_(targets_BCN)
        ctx.save_for_backward(difference_BCN, weights_BN1, scale_B11)
        return (difference_BCN.square() @ weights_BN1).squeeze(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BC: Tensor) -> tuple[Tensor, None, None, None]:
        """Return ``2 g w_n s (s x_n - y_n)``."""
        difference_BCN, weights_BN1, scale_B11 = ctx.saved_tensors
        factor_BC1 = 2 * grad_BC[:, :, None]
        if scale_B11 is not None:
            factor_BC1 = factor_BC1 * scale_B11
        return (difference_BCN * weights_BN1.mT).mul_(factor_BC1), None, None, None


class GramTimes(torch.autograd.Function):
    """``P X X^T`` for a few rows P, without forming ``X X^T``."""

    @staticmethod
    def forward(ctx: Any, vectors_BdC: Tensor, rows_BCN: Tensor) -> Tensor:
        """Return (B, d, C)."""
        projected_BdN = vectors_BdC @ rows_BCN
        ctx.save_for_backward(vectors_BdC, rows_BCN, projected_BdN)
        return projected_BdN @ rows_BCN.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BdC: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return ``G X X^T``, and ``G^T (P X) + P^T (G X)``."""
        vectors_BdC, rows_BCN, projected_BdN = ctx.saved_tensors
        grad_BdN = grad_BdC @ rows_BCN
        grad_vectors_BdC = grad_BdN @ rows_BCN.mT if ctx.needs_input_grad[0] else None
        both_BdC = torch.cat([grad_BdC, vectors_BdC], 1)
        return grad_vectors_BdC, both_BdC.mT @ torch.cat([projected_BdN, grad_BdN], 1)
