"""Attention weights for positions, channels and pairs of channels.

They are computed from the teacher's features and from the boxes around the objects of an image.

Shape letters: B batch, C channels, H height, W width, N = H * W positions, M boxes of an image,
L cells along one axis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raygkd.graph.adjacency import adjacency
from raygkd.graph.checks import choice_problem, require, share_problem, temperature_problem
from raygkd.graph.precision import full_precision

ATTENTION_MODES = ("outer", "softmax")


def attention_masks(
    features_BCHW: Tensor, temperature: float, *, relative: bool = False
) -> tuple[Tensor, Tensor]:
    """Return ``softmax_masks`` of the teacher's features, detached."""
    return softmax_masks(features_BCHW.detach(), temperature, relative=relative)


@full_precision
def softmax_masks(
    features_BCHW: Tensor, temperature: float, *, relative: bool = False
) -> tuple[Tensor, Tensor]:
    """Return spatial and channel attention masks, each with a mean of 1.

    ``a_S = N softmax_n(mean_c |F| / T)`` and ``a_C = C softmax_c(mean_n |F| / T)``.

    Args:
        features_BCHW: feature maps (B, C, H, W).
        temperature: T > 0; a higher one gives flatter masks.
        relative: whether T is in units of the mean magnitude of each sample's map, which makes it
            comparable across networks, rather than in units of the features.

    Returns:
        spatial (B, 1, H, W) and channel (B, C) masks.

    Raises:
        ConfigError: the temperature is not above 0.

    Source: FGD, arXiv 2111.11837; weighting graphs with them is [ours].
    """
    require(temperature_problem(temperature))
    _, channels, height, width = features_BCHW.shape
    magnitude_BCN = features_BCHW.abs().flatten(2)
    if relative:
        mean_B11 = magnitude_BCN.mean((1, 2), keepdim=True)
        magnitude_BCN = magnitude_BCN / mean_B11.clamp_min(torch.finfo(mean_B11.dtype).tiny)
    spatial_BN = (magnitude_BCN.mean(1) / temperature).softmax(1) * (height * width)
    channel_BC = (magnitude_BCN.mean(2) / temperature).softmax(1) * channels
    return spatial_BN.unflatten(1, (1, height, width)), channel_BC


@torch.no_grad()
@full_precision
def relational_attention(
    features_BCHW: Tensor, temperature: float, mode: str = "outer", *, relative: bool = False
) -> Tensor:
    """Return weights for the graph's edges, with a mean of 1 over all pairs of channels.

    Mode "outer" is ``R = a_C a_C^T`` with the channel mask of ``attention_masks``; "softmax" is
    ``R_ij = C softmax_j(|A_ij| / T)``, where each row averages to 1 and R need not be symmetric.

    Args:
        features_BCHW: the teacher's feature maps (B, C, H, W).
        temperature: T > 0, in units of the features ("outer") or of cosines ("softmax").
        mode: "outer" or "softmax".
        relative: whether T is in units of the mean magnitude of each sample's features or cosines.

    Returns:
        (B, C, C) weights, detached.

    Raises:
        ConfigError: the temperature is not above 0, or the mode is unknown.

    Source: [ours].
    """
    require(
        temperature_problem(temperature), choice_problem("attention mode", mode, ATTENTION_MODES)
    )
    if mode == "outer":
        _, channel_BC = attention_masks(features_BCHW, temperature, relative=relative)
        return channel_BC[:, :, None] * channel_BC[:, None, :]
    strength_BCC = adjacency(features_BCHW).abs()
    if relative:
        mean_B11 = strength_BCC.mean((1, 2), keepdim=True)
        strength_BCC = strength_BCC / mean_B11.clamp_min(torch.finfo(mean_B11.dtype).tiny)
    return (strength_BCC / temperature).softmax(2) * features_BCHW.shape[1]


@torch.no_grad()
def foreground_weights(
    boxes: Sequence[Tensor], canvas: int, grid: tuple[int, int], share: float
) -> Tensor:
    """Return position weights that give the objects a fixed share of the total, with a mean of 1.

    A grid cell is foreground if its centre lies inside a box. A box too thin to contain a centre is
    widened to one cell at its middle, so every box marks at least one cell. The foreground gets
    ``share`` of the total weight; the background, including padding, gets the rest. Weights are
    uniform within each. An image that is all background or all foreground has weights of 1.

    Args:
        boxes: (M, 4) for each image, as x0, y0, x1, y1 in pixels of the canvas; M may be 0.
        canvas: side in pixels of the model's square input.
        grid: H and W of the feature map that covers the canvas.
        share: of the foreground in the total weight, from 0 to 1.

    Returns:
        (B, H, W) float32, detached, on the device of the boxes.

    Raises:
        ConfigError: the share is outside 0..1.

    Source: [ours]; FGD, arXiv 2111.11837, weights objects and background separately.
    """
    require(share_problem(share))
    height, width = grid
    foreground_BHW = torch.stack(
        [
            (
                _covered_cells(boxes_M4[:, 1], boxes_M4[:, 3], canvas, height)[:, :, None]
                & _covered_cells(boxes_M4[:, 0], boxes_M4[:, 2], canvas, width)[:, None, :]
            ).any(0)
            for boxes_M4 in boxes
        ]
    )
    marked_B11 = foreground_BHW.sum((1, 2), keepdim=True)
    cells = height * width
    weights_BHW = torch.where(
        foreground_BHW,
        share * cells / marked_B11,
        (1 - share) * cells / (cells - marked_B11),
    )
    return weights_BHW.masked_fill((marked_B11 == 0) | (marked_B11 == cells), 1.0)


def _covered_cells(begin_M: Tensor, end_M: Tensor, canvas: int, cells: int) -> Tensor:
    """Return a bool mask (M, L) of the cells along an axis that each box covers, at least one."""
    begin_M1, end_M1 = (side_M.float()[:, None] * (cells / canvas) for side_M in (begin_M, end_M))
    place = torch.arange(cells, device=begin_M.device)
    middle_M1 = ((begin_M1 + end_M1) / 2).floor().clamp(0, cells - 1)
    inside_ML = (begin_M1 <= place + 0.5) & (place + 0.5 < end_M1)
    return inside_ML | (~inside_ML.any(1, keepdim=True) & (place == middle_M1))
