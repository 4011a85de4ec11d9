"""Forms of the graph terms that were tried beside those of ``raygkd.losses``.

Each is a function of one level's maps, the student's behind its adapter (or not), and gives a
scalar. ``strong_teacher.py`` names them on its command line; what they gave is in its table. All of
them are [ours], or as it is said.

Shape letters: B batch, C channels, H height, W width, N = H * W positions, G graphs, V vertices of
a graph, E entries of a vertex, d spectral dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_TOKEN_GRID = 8
# of the squared norm of a vertex, in units of the mean one of its graph
FLOOR = 1e-2


def masks(teacher_BCHW: Tensor, kind: str, temperature: float) -> tuple[Tensor, Tensor]:
    """Return weights of positions (B, 1, H, W) and of channels (B, C, 1, 1), each of mean 1.

    "softmax" has its temperature relative to the sample's mean magnitude, "half" is its mean with
    1, "root" is proportional to the square root of the magnitude, "power" to the magnitude to the
    power of the temperature, and "uniform" is 1.
    """
    magnitude_BCHW = teacher_BCHW.abs()
    spatial_B1HW = magnitude_BCHW.mean(1, keepdim=True)
    channel_BC11 = magnitude_BCHW.mean((2, 3), keepdim=True)
    return (
        _mask(spatial_B1HW, kind, temperature),
        _mask(channel_BC11, kind, temperature),
    )


def _mask(magnitude: Tensor, kind: str, temperature: float) -> Tensor:
    relative_BJ = magnitude.flatten(1)
    relative_BJ = relative_BJ / relative_BJ.mean(1, keepdim=True).clamp_min(1e-12)
    if kind == "uniform":
        mask_BJ = torch.ones_like(relative_BJ)
    elif kind == "power":
        mask_BJ = relative_BJ.clamp_min(1e-6) ** temperature
    else:
        mask_BJ = (relative_BJ / temperature).softmax(1) * relative_BJ.shape[1]
        if kind == "half":
            mask_BJ = (mask_BJ + 1) / 2
    mask_BJ = mask_BJ / mask_BJ.mean(1, keepdim=True)
    return mask_BJ.view_as(magnitude)


def vertex(
    student_BCHW: Tensor, teacher_BCHW: Tensor, mask: str = "uniform", temperature: float = 1.0
) -> Tensor:
    """Return the relative squared error of the maps, under masks."""
    spatial_B1HW, channel_BC11 = masks(teacher_BCHW, mask, temperature)
    squares_BCHW = (student_BCHW - teacher_BCHW).square() * spatial_B1HW * channel_BC11
    return (squares_BCHW.mean((1, 2, 3)) / teacher_BCHW.square().mean((1, 2, 3))).mean()


def vertices(maps_BCHW: Tensor, of: str, scope: str, centre: bool) -> Tensor:
    """Return the vertices (G, V, E) of the graphs of a batch.

    Args:
        maps_BCHW: feature maps.
        of: "channels", or "tokens" on a grid of at most 8 x 8.
        scope: "image" for a graph an image, "batch" for one graph of all images.
        centre: subtract what is common: of channels their means over the entries, of tokens the
            mean token.
    """
    if of == "channels":
        rows_GVE = maps_BCHW.flatten(2)
        if scope == "batch":
            rows_GVE = rows_GVE.transpose(0, 1).flatten(1)[None]
        return rows_GVE - rows_GVE.mean(2, keepdim=True) if centre else rows_GVE
    side = LARGEST_TOKEN_GRID if scope == "image" else 2
    grid = tuple(min(side, length) for length in maps_BCHW.shape[2:])
    tokens_GVE = F.adaptive_avg_pool2d(maps_BCHW, grid).flatten(2).mT
    if scope == "batch":
        tokens_GVE = tokens_GVE.flatten(0, 1)[None]
    return tokens_GVE - tokens_GVE.mean(1, keepdim=True) if centre else tokens_GVE


def cosines(vertices_GVE: Tensor, floor: float = FLOOR) -> Tensor:
    """Return cosines (G, V, V) with a floor under the norms, so that no gradient explodes."""
    squares_GV1 = vertices_GVE.square().sum(2, keepdim=True)
    least_G11 = floor * squares_GV1.mean(1, keepdim=True) + 1e-12
    unit_GVE = vertices_GVE * (squares_GV1 + least_G11).rsqrt()
    return unit_GVE @ unit_GVE.mT


def _pairs(teacher_GVE: Tensor, weigh: str) -> Tensor:
    """Return weights (G, V, V) of the pairs, without the diagonal, of sum 1."""
    count = teacher_GVE.shape[1]
    if weigh == "none":
        weights_GVV = teacher_GVE.new_ones(len(teacher_GVE), count, count)
    else:
        # as their norms, a pair counts as its inner product does; "root" is between the two
        norms_GV = teacher_GVE.square().sum(2).sqrt()
        norms_GV = norms_GV.sqrt() if weigh == "root" else norms_GV
        weights_GVV = norms_GV[:, :, None] * norms_GV[:, None, :]
    weights_GVV = weights_GVV * (1 - torch.eye(count))
    return weights_GVV / weights_GVV.sum((1, 2), keepdim=True).clamp_min(1e-12)


def edge(
    student_BCHW: Tensor,
    teacher_BCHW: Tensor,
    of: str = "channels",
    scope: str = "image",
    centre: bool = True,
    weigh: str = "norm",
    floor: float = FLOOR,
) -> Tensor:
    """Return the weighted mean of the squared differences of cosines over the pairs of vertices."""
    student_GVE = vertices(student_BCHW, of, scope, centre)
    teacher_GVE = vertices(teacher_BCHW, of, scope, centre)
    difference_GVV = cosines(student_GVE, floor) - cosines(teacher_GVE, floor)
    return (_pairs(teacher_GVE, weigh) * difference_GVV.square()).sum((1, 2)).mean()


def contrast(
    student_BCHW: Tensor,
    teacher_BCHW: Tensor,
    of: str = "tokens",
    scope: str = "image",
    centre: bool = True,
    tau: float = 0.1,
) -> Tensor:
    """Return KL of the rows' softmax of cosines over tau, as dense token similarities have it."""
    student_GVV = cosines(vertices(student_BCHW, of, scope, centre)) / tau
    teacher_GVV = cosines(vertices(teacher_BCHW, of, scope, centre)) / tau
    off = torch.eye(student_GVV.shape[1], dtype=torch.bool)
    student_GVV, teacher_GVV = (
        rows.masked_fill(off, -1e4).log_softmax(2) for rows in (student_GVV, teacher_GVV)
    )
    return F.kl_div(student_GVV, teacher_GVV, log_target=True, reduction="none").sum(2).mean()


def spectral(
    student_BCHW: Tensor,
    teacher_BCHW: Tensor,
    of: str = "channels",
    scope: str = "image",
    centre: bool = True,
    dim: int = 8,
    mode: str = "residual",
    floor: float = FLOOR,
) -> Tensor:
    """Return how far the teacher's leading eigenpairs are from being the student's.

    Of ``S = D^-1/2 W D^-1/2`` with ``W = (1 + A) / 2``, its trivial pair taken out ("residual"), or
    of A itself ("plain"): centred, A has no trivial pair. Pairs count by the teacher's eigenvalues
    and the sum is divided by the power of the teacher's whole graph, which does not vanish when
    its leading eigenvalues do, as those of S' do.
    """
    student_GVV = cosines(vertices(student_BCHW, of, scope, centre), floor)
    teacher_GVV = cosines(vertices(teacher_BCHW, of, scope, centre), floor)
    if mode != "plain":
        student_GVV, teacher_GVV = _deflated(student_GVV), _deflated(teacher_GVV)
    with torch.no_grad():
        values_GV, vectors_GVV = torch.linalg.eigh(teacher_GVV)
        values_G1d, vectors_GVd = values_GV[:, None, -dim:], vectors_GVV[:, :, -dim:]
    error_G = (student_GVV @ vectors_GVd - vectors_GVd * values_G1d).square().sum((1, 2))
    return (error_G / values_G1d.square().sum((1, 2)).clamp_min(1e-12)).mean()


def _deflated(cosines_GVV: Tensor) -> Tensor:
    weights_GVV = (1 + cosines_GVV) / 2
    degrees_GV1 = weights_GVV.sum(2, keepdim=True)
    root_GV1 = degrees_GV1.rsqrt()
    trivial_GV1 = degrees_GV1.sqrt() / degrees_GV1.sum(1, keepdim=True).sqrt()
    return root_GV1 * weights_GVV * root_GV1.mT - trivial_GV1 @ trivial_GV1.mT


FORMS = {
    "vertex": vertex,
    "edge": edge,
    "contrast": contrast,
    "spectral": spectral,
}
