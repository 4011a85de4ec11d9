"""Channel graphs side by side: one graph of several images, one order, one orientation.

Shape letters: B batch, C channels, H height, W width, N = H * W positions, d spectral dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from raygkd.graph import adjacency, normalised_channels, spectral_embedding
from raygkd.losses.spectral import procrustes_distance

# of an embedding, what a picture has
PLANE = 2


@dataclass(frozen=True, eq=False)
class GraphView:
    """The graph of one model at one level, ready to draw.

    Attributes:
        adjacency_CC: cosines of the channels, in the teacher's order.
        embedding_C2: the channels' places in the plane, in the same order, turned to the teacher's.
        edge_difference: root mean square of the difference to the teacher's adjacency.
        spectral_distance: ``procrustes_distance`` to the teacher's embedding, in d dimensions.
    """

    adjacency_CC: Tensor
    embedding_C2: Tensor
    edge_difference: float
    spectral_distance: float


def joined_maps(maps_BCHW: Tensor) -> Tensor:
    """Return maps whose single graph is the mean of the images' graphs.

    The channels of every image are normalised to unit length and concatenated; their cosines are
    the means of the images' cosines. For a channel that is dead in some images, the other images
    count.

    Args:
        maps_BCHW: feature maps (B, C, H, W).

    Returns:
        (1, C, B, N).
    """
    return normalised_channels(maps_BCHW).transpose(0, 1)[None]


def fiedler_order(maps_1CBN: Tensor, weights: str) -> Tensor:
    """Return an order of the channels that puts similar ones next to each other (C,).

    They are sorted by the graph's Fiedler vector, its leading non-trivial eigenvector. Its sign is
    arbitrary: the largest entry is made positive.

    Args:
        maps_1CBN: from ``joined_maps``.
        weights: of the spectral graph.
    """
    _, vectors_1C1 = spectral_embedding(maps_1CBN, 1, weights)
    vector_C = vectors_1C1[0, :, 0]
    sign = torch.sign(vector_C[vector_C.abs().argmax()])
    return torch.argsort(sign * vector_C, stable=True)


def turned(places_Cd: Tensor, to_Cd: Tensor) -> Tensor:
    """Return an embedding after the rotation or reflection that brings it closest to another.

    Args:
        places_Cd: the embedding to rotate (C, d).
        to_Cd: the target (C, d).

    Source: the orthogonal Procrustes problem (Schönemann, 1966).
    """
    left_dd, _, right_dd = torch.linalg.svd(places_Cd.mT @ to_Cd)
    return places_Cd @ (left_dd @ right_dd)


def graph_views(
    teacher_BCHW: Tensor, others: Mapping[str, Tensor], *, dim: int, weights: str
) -> dict[str, GraphView]:
    """Return the mean graphs over some images, of the teacher and the others.

    Args:
        teacher_BCHW: the teacher's maps.
        others: name -> maps of the same shape, channel by channel comparable to the teacher's.
        dim: spectral dimension d of the distance, at most C - 1.
        weights: of the spectral graph, see ``raygkd.graph.normalised_factor``.

    Returns:
        "teacher" and the others' names -> view.
    """
    joined = {
        name: joined_maps(maps_BCHW)
        for name, maps_BCHW in {"teacher": teacher_BCHW, **others}.items()
    }
    teacher_1CBN = joined["teacher"]
    order_C = fiedler_order(teacher_1CBN, weights)
    teacher_CC = adjacency(teacher_1CBN)[0]
    teacher_spectrum = spectral_embedding(teacher_1CBN, dim, weights)
    teacher_C2 = _plane(teacher_1CBN, weights)
    views = {}
    for name, maps_1CBN in joined.items():
        adjacency_CC = adjacency(maps_1CBN)[0]
        spectrum = spectral_embedding(maps_1CBN, dim, weights)
        views[name] = GraphView(
            adjacency_CC[order_C][:, order_C],
            turned(_plane(maps_1CBN, weights), teacher_C2)[order_C],
            float((adjacency_CC - teacher_CC).square().mean().sqrt()),
            float(procrustes_distance(*spectrum, *teacher_spectrum)[0]),
        )
    return views


def _plane(maps_1CBN: Tensor, weights: str) -> Tensor:
    """Return the first two dimensions of ``U Lambda^1/2`` (C, 2); a missing one is 0."""
    dim = min(PLANE, maps_1CBN.shape[1] - 1)
    values_1d, vectors_1Cd = spectral_embedding(maps_1CBN, dim, weights)
    places_Cd = vectors_1Cd[0] * values_1d.sqrt()
    return torch.nn.functional.pad(places_Cd, (0, PLANE - dim))
