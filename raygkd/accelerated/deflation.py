"""The normalised graph without its trivial eigenpair, with gradients in few passes.

Shape letters: B batch, C channels, N positions, K columns of the factor (N or N + 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raygkd.graph.operators import degree_scales


class Deflated(torch.autograd.Function):
    """``M' = M - u0 t^T`` with ``M = D^-1/2 G`` and ``t = M^T u0``, in few passes over G.

    G is given by its rows X, optionally preceded by a column of ones. Its scale is that of W, on
    which M does not depend.
    """

    @staticmethod
    def forward(ctx: Any, rows_BCN: Tensor, ones: int) -> Tensor:
        """Return M' (B, C, K) of ``G = [1, X]``, or of ``G = X``.

        Args:
            rows_BCN: X.
            ones: number of columns of ones before X, 1 or 0.
        """
        batch, channels, positions = rows_BCN.shape
        sums_B1N = rows_BCN.sum(1, keepdim=True)
        degrees_BC1 = rows_BCN @ sums_B1N.mT + ones * channels
        root_BC1, trivial_BC1 = degree_scales(degrees_BC1)
        scaled_B1C = (trivial_BC1 * root_BC1).mT
        projected_B1K = _with_ones(scaled_B1C.sum(2, keepdim=True), scaled_B1C @ rows_BCN, ones)
        ctx.save_for_backward(rows_BCN, sums_B1N, degrees_BC1, projected_B1K)
        factor_BCK = rows_BCN.new_empty(batch, channels, ones + positions)
        factor_BCK[:, :, :ones] = root_BC1
        torch.mul(rows_BCN, root_BC1, out=factor_BCK[:, :, ones:])
        return factor_BCK.addcmul_(trivial_BC1, projected_B1K, value=-1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BCK: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of X: the scaled gradient of M' plus three matrices of rank one.

        The component orthogonal to u0 flows to M. Through D^-1/2 and ``u0 = sqrt(D) / |sqrt(D)|``,
        the gradient also flows to the degrees ``G G^T 1``.
        """
        rows_BCN, sums_B1N, degrees_BC1, projected_B1K = ctx.saved_tensors
        ones = grad_BCK.shape[2] - rows_BCN.shape[2]
        root_BC1, trivial_BC1 = degree_scales(degrees_BC1)
        volume_B11 = degrees_BC1.sum(1, keepdim=True)
        volume_B11 = volume_B11.masked_fill(volume_B11 <= 0, 1.0)

        along_B1K = trivial_BC1.mT @ grad_BCK
        to_ones_BC1 = grad_BCK[:, :, :ones].sum(2, keepdim=True)
        grad_BCN, along_B1N = grad_BCK[:, :, ones:], along_B1K[:, :, ones:]
        shared_BC1 = rows_BCN @ along_B1N.mT + along_B1K[:, :, :ones].sum(2, keepdim=True)
        to_root_BC1 = (grad_BCN * rows_BCN).sum(2, keepdim=True) + to_ones_BC1
        to_root_BC1 = to_root_BC1 - trivial_BC1 * shared_BC1
        to_trivial_BC1 = -(grad_BCK @ projected_B1K.mT) - root_BC1 * shared_BC1
        to_length_B11 = (to_trivial_BC1 * trivial_BC1).sum(1, keepdim=True)
        to_degrees_BC1 = to_trivial_BC1 * root_BC1 / volume_B11.sqrt() - to_length_B11 / volume_B11
        to_degrees_BC1 = (to_degrees_BC1 - to_root_BC1 * root_BC1**3) / 2

        left_BC3 = torch.cat(
            [-root_BC1 * trivial_BC1, to_degrees_BC1, torch.ones_like(root_BC1)], 2
        )
        right_B3N = torch.cat([along_B1N, sums_B1N, to_degrees_BC1.mT @ rows_BCN], 1)
        return torch.baddbmm(grad_BCN * root_BC1, left_BC3, right_B3N), None


class DeflatedAdjacency(torch.autograd.Function):
    """``S' = D^-1/2 W D^-1/2 - u0 u0^T`` of ``W = A + shift``; S does not depend on its scale."""

    @staticmethod
    def forward(ctx: Any, adjacency_BCC: Tensor, shift: int) -> Tensor:
        """Return S' (B, C, C)."""
        degrees_BC1 = adjacency_BCC.sum(2, keepdim=True) + shift * adjacency_BCC.shape[1]
        root_BC1, trivial_BC1 = degree_scales(degrees_BC1)
        graph_BCC = ((adjacency_BCC + shift) * root_BC1).mul_(root_BC1.mT)
        graph_BCC.addcmul_(trivial_BC1, trivial_BC1.mT, value=-1.0)
        ctx.save_for_backward(graph_BCC, degrees_BC1)
        return graph_BCC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BCC: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of A; that of S' must be symmetric, as eigenpairs make it."""
        graph_BCC, degrees_BC1 = ctx.saved_tensors
        root_BC1, trivial_BC1 = degree_scales(degrees_BC1)
        volume_B11 = degrees_BC1.sum(1, keepdim=True)
        volume_B11 = volume_B11.masked_fill(volume_B11 <= 0, 1.0)

        # half the gradient of u0, and half that of D^-1/2, multiplied by D^-1/2
        to_trivial_BC1 = -(grad_BCC @ trivial_BC1)
        to_root_BC1 = (grad_BCC * graph_BCC).sum(2, keepdim=True) - trivial_BC1 * to_trivial_BC1
        to_length_B11 = (to_trivial_BC1 * trivial_BC1).sum(1, keepdim=True)
        to_degrees_BC1 = to_trivial_BC1 * root_BC1 / volume_B11.sqrt() - to_length_B11 / volume_B11
        to_degrees_BC1 = to_degrees_BC1 - to_root_BC1 * root_BC1**2
        return (grad_BCC * root_BC1).mul_(root_BC1.mT).add_(to_degrees_BC1), None


def _with_ones(ones_product_B11: Tensor, rows_product_B1N: Tensor, ones: int) -> Tensor:
    """Return a product with G (B, 1, K), given those with its column of ones and with X."""
    return torch.cat([ones_product_B11, rows_product_B1N], 2) if ones else rows_product_B1N
