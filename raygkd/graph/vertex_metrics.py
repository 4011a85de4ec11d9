"""Metrics of network theory for the vertices of weighted graphs, in closed forms.

The graphs are complete: every two vertices have an edge, with a weight above 0. All metrics are
differentiable; they are those of networkx of the same name.

Shape letters: G graphs, C vertices (channels), M metrics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from raygkd.graph.checks import choice_problem, require
from raygkd.graph.eigen import without_nonfinite
from raygkd.graph.precision import full_precision

# smallest weight of an edge: the gradient of clustering grows as weight^(-2/3)
SMALLEST_WEIGHT = 1e-3
# smallest distance of two channels, which bounds the gradient of closeness
SMALLEST_DISTANCE = 1e-3
# PageRank's probability to follow an edge
DAMPING = 0.85


@full_precision
def vertex_metrics(similarities_GCC: Tensor, names: Sequence[str]) -> Tensor:
    """Return metrics of the graphs' vertices.

    The weight of an edge is ``(1 + A_ij) / 2``, at least 0.001, and there are no loops. The
    distance of two vertices is ``sqrt(A_ii + A_jj - 2 A_ij)``, at least 0.001. It is the Euclidean
    distance of the vectors whose products are A, so no way is shorter than the direct one.

    Args:
        similarities_GCC: products A of vectors of length 1 or less, as cosines and correlations
            are; C at least 3.
        names: of METRICS, at least one.

    Returns:
        (G, M, C): degree divided by C - 1; clustering, from 0 to 1; pagerank times C; eigenvector
        (centrality) times sqrt(C); and closeness, the inverse of the mean distance.

    Raises:
        ConfigError: an unknown name, or none.

    Source: [ours] for the weights and distances of channels; metrics as networkx has them.
    """
    require(*metrics_problems(names))
    # decompositions refuse numbers that are not finite
    similarities_GCC, nonfinite_G11 = without_nonfinite(similarities_GCC)
    weights_GCC = weights(similarities_GCC)
    distances_GCC = distances(similarities_GCC)
    metrics = [
        closeness(distances_GCC) if name == "closeness" else _OF_WEIGHTS[name](weights_GCC)
        for name in names
    ]
    return torch.stack(metrics, 1).masked_fill(nonfinite_G11, math.nan)


def metrics_problems(names: Sequence[str]) -> list[str | None]:
    """Return the problems of the names of metrics."""
    if not names:
        return [f"no graph metrics; choose at least one (allowed: {', '.join(METRICS)})"]
    return [choice_problem("graph metric", name, METRICS) for name in names]


def weights(similarities_GCC: Tensor) -> Tensor:
    """Return the edges' weights (G, C, C); 0 on the diagonal."""
    weights_GCC = ((1 + similarities_GCC) / 2).clamp_min(SMALLEST_WEIGHT)
    return weights_GCC * (1 - _identity(weights_GCC))


def degree(weights_GCC: Tensor) -> Tensor:
    """Return the mean weight (G, C) of a vertex's edges."""
    return weights_GCC.sum(-1) / (weights_GCC.shape[-1] - 1)


def clustering(weights_GCC: Tensor) -> Tensor:
    """Return the mean over a vertex's triangles (G, C) of their edges' geometric mean.

    Weights are divided by the largest one of the graph (Onnela et al.).
    """
    others = weights_GCC.shape[-1] - 1
    weights_GCC = weights_GCC / weights_GCC.amax((-2, -1), keepdim=True)
    # loops have no weight, and the root no derivative there
    is_edge_GCC = weights_GCC > 0
    roots_GCC = torch.where(is_edge_GCC, weights_GCC, 1.0).pow(1 / 3) * is_edge_GCC
    triangles_GC = ((roots_GCC @ roots_GCC) * roots_GCC).sum(-1)
    return triangles_GC / (others * (others - 1))


def pagerank(weights_GCC: Tensor) -> Tensor:
    """Return the stationary probabilities (G, C) of a walk along edges, times C.

    With probability 0.85 a step follows an edge by its share of the vertex's weights; otherwise it
    leads to any vertex.
    """
    channels = weights_GCC.shape[-1]
    steps_GCC = weights_GCC / weights_GCC.sum(-1, keepdim=True)
    identity_CC = _identity(weights_GCC)
    jumps_GC1 = weights_GCC.new_full((len(weights_GCC), channels, 1), 1 - DAMPING)
    return torch.linalg.solve(identity_CC - DAMPING * steps_GCC.mT, jumps_GC1)[..., 0]


def eigenvector(weights_GCC: Tensor) -> Tensor:
    """Return the positive leading eigenvector (G, C) of length sqrt(C).

    Its derivative needs no other eigenvectors: it solves a linear system. Only first derivatives
    are right.
    """
    fixed_GCC = weights_GCC.detach()
    channels = weights_GCC.shape[-1]
    values_GC, vectors_GCC = torch.linalg.eigh(fixed_GCC)
    leading_GC1 = vectors_GCC[..., -1:]
    leading_GC1 = leading_GC1 * leading_GC1.sum(-2, keepdim=True).sign()
    identity_CC = _identity(weights_GCC)
    system_GCC = values_GC[..., -1:, None] * identity_CC - fixed_GCC + leading_GC1 @ leading_GC1.mT
    image_GC1 = weights_GCC @ leading_GC1
    rest_GC1 = image_GC1 - leading_GC1 @ (leading_GC1.mT @ image_GC1)
    return (leading_GC1 + torch.linalg.solve(system_GCC, rest_GC1))[..., 0] * channels**0.5


def distances(similarities_GCC: Tensor) -> Tensor:
    """Return the distances (G, C, C) of vectors with these products; 0 to themselves."""
    squares_GC = similarities_GCC.diagonal(dim1=-2, dim2=-1)
    squares_GCC = squares_GC[..., None] + squares_GC[..., None, :] - 2 * similarities_GCC
    distances_GCC = squares_GCC.clamp_min(SMALLEST_DISTANCE**2).sqrt()
    return distances_GCC * (1 - _identity(distances_GCC))


def closeness(distances_GCC: Tensor) -> Tensor:
    """Return the inverse of the mean distance (G, C) to the other vertices."""
    return (distances_GCC.shape[-1] - 1) / distances_GCC.sum(-1)


def _identity(matrices_GCC: Tensor) -> Tensor:
    return torch.eye(matrices_GCC.shape[-1], dtype=matrices_GCC.dtype, device=matrices_GCC.device)


_OF_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "degree": degree,
    "clustering": clustering,
    "pagerank": pagerank,
    "eigenvector": eigenvector,
}
METRICS = (*_OF_WEIGHTS, "closeness")
