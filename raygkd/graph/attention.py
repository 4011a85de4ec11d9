"""Where the teacher looks: weights of positions, channels and pairs of channels.

Shape letters: B batch, C channels, H height, W width, N = H * W positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raygkd.graph.adjacency import adjacency
from raygkd.graph.checks import choice_problem, require, temperature_problem
from raygkd.graph.precision import full_precision

ATTENTION_MODES = ("outer", "softmax")


@torch.no_grad()
@full_precision
def attention_masks(features_BCHW: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return spatial and channel attention, each averaging to 1 over what it weighs.

    ``a_S = N softmax_n(mean_c |F| / T)`` and ``a_C = C softmax_c(mean_n |F| / T)``.

    Args:
        features_BCHW: feature maps (B, C, H, W) of the teacher.
        temperature: T > 0, in units of the features; a higher one gives flatter masks.

    Returns:
        spatial (B, 1, H, W) and channel (B, C) masks, both without gradient.

    Raises:
        ConfigError: the temperature is not above 0.

    Source: [ours]; the form of the masks is FGD's, arXiv 2111.11837.
    """
    require(temperature_problem(temperature))
    _, channels, height, width = features_BCHW.shape
    magnitude_BCN = features_BCHW.abs().flatten(2)
    spatial_BN = (magnitude_BCN.mean(1) / temperature).softmax(1) * (height * width)
    channel_BC = (magnitude_BCN.mean(2) / temperature).softmax(1) * channels
    return spatial_BN.unflatten(1, (1, height, width)), channel_BC


@torch.no_grad()
@full_precision
def relational_attention(features_BCHW: Tensor, temperature: float, mode: str = "outer") -> Tensor:
    """Return weights of the graph's edges, averaging to 1 over all pairs of channels.

    Mode "outer" is ``R = a_C a_C^T`` with the channel mask of ``attention_masks``; "softmax" is
    ``R_ij = C softmax_j(|A_ij| / T)``, where each row averages to 1 and R need not be symmetric.

    Args:
        features_BCHW: feature maps (B, C, H, W) of the teacher.
        temperature: T > 0, in units of the features ("outer") or of cosines ("softmax").
        mode: "outer" or "softmax".

    Returns:
        (B, C, C) weights without gradient.

    Raises:
        ConfigError: the temperature is not above 0, or the mode is unknown.

    Source: [ours].
    """
    require(
        temperature_problem(temperature), choice_problem("attention mode", mode, ATTENTION_MODES)
    )
    if mode == "outer":
        _, channel_BC = attention_masks(features_BCHW, temperature)
        return channel_BC[:, :, None] * channel_BC[:, None, :]
    strength_BCC = adjacency(features_BCHW).abs()
    return (strength_BCC / temperature).softmax(2) * features_BCHW.shape[1]
