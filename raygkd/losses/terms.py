"""The three distances between the channels relational graphs of two feature maps.

The formulas are [ours]; that vertices, edges and a spectral embedding are aligned under attention
is the paper's (arXiv 2405.08547). Every loss is a mean over samples of what depends on one sample
alone, so that steps over parts of a batch average to the step over the whole batch. The teacher
never gets a gradient.

Shape letters: B batch, C channels, H height, W width, N = H * W positions, d spectral dimension.
"""

from __future__ import annotations

import functools

from torch import Tensor

from raygkd.graph import (
    ATTENTION_MODES,
    attention_masks,
    choice_problem,
    full_precision,
    normalised_channels,
    relational_attention,
    require,
    rows_times,
    shape_problem,
    spectral_embedding,
    temperature_problem,
    unit_rows,
)
from raygkd.graph.products import Gram, WeightedSquares
from raygkd.losses.spectral import (
    procrustes_distance,
    relative_to_teacher,
    residual_distance,
    subspace_distance,
)

SPECTRAL_MODES = ("residual", "subspace", "procrustes")


def vertex_loss(
    student_BCHW: Tensor,
    teacher_BCHW: Tensor,
    temperature: float,
    weights_BHW: Tensor | None = None,
) -> Tensor:
    """Return ``L_V = mean_{c,n} a_C a_S (F_t - F_s)^2 / mean(F_t^2)``, averaged over samples.

    The masks are the teacher's ``attention_masks``. The division makes the loss relative, so that
    its weight means the same for every layer; a sample whose teacher's map is zero counts as 0.

    Args:
        student_BCHW: feature maps (B, C, H, W), already of the teacher's shape.
        teacher_BCHW: feature maps (B, C, H, W).
        temperature: T > 0 of the attention, in units of the features.
        weights_BHW: weights of the positions (B, H, W) that multiply a_S, averaging to 1 over the
            positions of a sample, as ``foreground_weights`` gives them; None for 1 everywhere.

    Returns:
        A scalar without unit.

    Raises:
        ConfigError: the shapes differ, or the temperature is not above 0.

    Source: [paper] that vertices are aligned under attention; the formula is [ours].
    """
    return LevelMaps(student_BCHW, teacher_BCHW, temperature).vertex(weights_BHW).mean()


def edge_loss(
    student_BCHW: Tensor, teacher_BCHW: Tensor, temperature: float, attention: str = "outer"
) -> Tensor:
    """Return ``L_E = mean_ij R_ij (A_t,ij - A_s,ij)^2``, averaged over samples.

    Args:
        student_BCHW: feature maps (B, C, H, W), already of the teacher's shape.
        teacher_BCHW: feature maps (B, C, H, W).
        temperature: T > 0 of the attention, see ``relational_attention``.
        attention: mode of the relational attention R, "outer" or "softmax".

    Returns:
        A scalar in squared cosines.

    Raises:
        ConfigError: the shapes differ, the temperature is not above 0, or the mode is unknown.

    Source: [paper] that edges are aligned under relational attention; the formula is [ours].
    """
    return LevelMaps(student_BCHW, teacher_BCHW, temperature).edge(attention).mean()


def spectral_loss(
    student_BCHW: Tensor,
    teacher_BCHW: Tensor,
    dim: int,
    mode: str = "residual",
    weights: str = "shifted",
) -> Tensor:
    """Return the distance of the spectral embeddings of both graphs, averaged over samples.

    Args:
        student_BCHW: feature maps (B, C, H, W), already of the teacher's shape.
        teacher_BCHW: feature maps (B, C, H, W).
        dim: spectral dimension d, from 1 to C - 1.
        mode: "residual", "subspace" or "procrustes", see ``raygkd.losses.spectral``.
        weights: "shifted" or "cosine", see ``normalised_factor``.

    Returns:
        A scalar, relative to the teacher's eigenvalues in every mode.

    Raises:
        ConfigError: the shapes differ, dim is outside 1..C-1, or mode or weights are unknown.

    Source: [paper] that a spectral embedding is aligned; the formulas are [ours].
    """
    maps = LevelMaps(student_BCHW, teacher_BCHW)
    require(choice_problem("spectral mode", mode, SPECTRAL_MODES))
    return maps.spectral(spectral_embedding(maps.teacher_BCHW, dim, weights), mode, weights).mean()


class LevelMaps:
    """The maps of one level, and what several of its losses take of them, worked out once.

    Args:
        student_BCHW: feature maps (B, C, H, W), already of the teacher's shape.
        teacher_BCHW: feature maps (B, C, H, W).
        temperature: T > 0 of the attention, in units of the features.

    Raises:
        ConfigError: the shapes differ, or the temperature is not above 0.
    """

    def __init__(self, student_BCHW: Tensor, teacher_BCHW: Tensor, temperature: float = 1.0):
        require(
            shape_problem("feature maps", student_BCHW, teacher_BCHW),
            temperature_problem(temperature),
        )
        self.student_BCHW, self.teacher_BCHW = in_full_precision(
            student_BCHW, teacher_BCHW.detach()
        )
        self._temperature = temperature

    @functools.cached_property
    def _masks(self) -> tuple[Tensor, Tensor]:
        return attention_masks(self.teacher_BCHW, self._temperature)

    @functools.cached_property
    def _student_rows(self) -> Tensor:
        return normalised_channels(self.student_BCHW)

    def vertex(self, weights_BHW: Tensor | None = None) -> Tensor:
        """Return ``vertex_loss`` of each sample (B,)."""
        spatial_B1HW, channel_BC = self._masks
        if weights_BHW is not None:
            spatial_B1HW = spatial_B1HW * weights_BHW[:, None]
        return _vertex_distance(self.student_BCHW, self.teacher_BCHW, spatial_B1HW, channel_BC)

    def edge(self, attention: str = "outer") -> Tensor:
        """Return ``edge_loss`` of each sample (B,)."""
        require(choice_problem("attention mode", attention, ATTENTION_MODES))
        teacher_BCN = normalised_channels(self.teacher_BCHW)
        if attention == "softmax":
            weights_BCC = relational_attention(self.teacher_BCHW, self._temperature, attention)
            return _weighted_edges(self._student_rows, teacher_BCN, weights_BCC)
        return _outer_edges(self._student_rows, teacher_BCN, self._masks[1])

    def spectral(self, teacher: tuple[Tensor, Tensor], mode: str, weights: str) -> Tensor:
        """Return ``spectral_loss`` of each sample (B,).

        Args:
            teacher: the embedding of the teacher's graph, values (B, d) and vectors (B, C, d).
            mode: see ``spectral_loss``.
            weights: those of the embedding.
        """
        if mode == "residual":
            return self._residual(*teacher, weights)
        student = spectral_embedding(self.student_BCHW, teacher[0].shape[1], weights)
        distance = subspace_distance if mode == "subspace" else procrustes_distance
        return distance(*student, *teacher)

    @full_precision
    def _residual(self, values_Bd: Tensor, vectors_BCd: Tensor, weights: str) -> Tensor:
        # the edges' rows are those of this graph, too
        shared = weights == "shifted"
        rows_BCN = self._student_rows if shared else unit_rows(self.student_BCHW, weights)
        return residual_distance(rows_times(rows_BCN, vectors_BCd, weights), values_Bd, vectors_BCd)


@full_precision
def in_full_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors in their common type, at least float32."""
    return tensors


@full_precision
def _vertex_distance(
    student_BCHW: Tensor, teacher_BCHW: Tensor, spatial_B1HW: Tensor, channel_BC: Tensor
) -> Tensor:
    """Return the relative squared error of each sample (B,), under both masks."""
    weights_BN1 = spatial_B1HW.flatten(2).mT
    error_BC = WeightedSquares.apply(student_BCHW.flatten(2), teacher_BCHW.flatten(2), weights_BN1)
    error_B = (error_BC * channel_BC).mean(1) / weights_BN1.shape[1]
    return relative_to_teacher(error_B, teacher_BCHW.square().mean((1, 2, 3)))


@full_precision
def _weighted_edges(student_BCN: Tensor, teacher_BCN: Tensor, weights_BCC: Tensor) -> Tensor:
    """Return ``mean_ij R_ij (A_t,ij - A_s,ij)^2`` of each sample (B,)."""
    return (weights_BCC * _adjacency_error(student_BCN, teacher_BCN).square()).mean((1, 2))


@full_precision
def _outer_edges(student_BCN: Tensor, teacher_BCN: Tensor, channel_BC: Tensor) -> Tensor:
    """Return ``mean_ij a_i a_j (A_t,ij - A_s,ij)^2`` of each sample (B,).

    Where there are fewer positions than channels nothing of size C x C is formed. With rows
    ``Y = a^1/2 X``, ``P = Y_t - Y_s`` and ``Q = Y_t + Y_s`` the difference of both weighted
    adjacencies is ``(P Q^T + Q P^T) / 2``, and so its squared norm half the sum of the entries of
    ``P^T P * Q^T Q + P^T Q * Q^T P``. Other than the difference of three norms it keeps its
    precision where both graphs are nearly equal.
    """
    channels, positions = student_BCN.shape[1:]
    if channels <= positions:
        squares_BCC = _adjacency_error(student_BCN, teacher_BCN).square()
        error_B = ((squares_BCC * channel_BC[:, None, :]).sum(2) * channel_BC).sum(1)
    else:
        root_BC1 = channel_BC.sqrt()[:, :, None]
        student_BCN, teacher_BCN = student_BCN * root_BC1, teacher_BCN * root_BC1
        difference_BCN, sum_BCN = teacher_BCN - student_BCN, teacher_BCN + student_BCN
        mixed_BNN = difference_BCN.mT @ sum_BCN
        even_BNN = Gram.apply(difference_BCN.mT) * Gram.apply(sum_BCN.mT)
        # both parts cancel where the graphs are equal and the maps are not
        error_B = ((even_BNN + mixed_BNN * mixed_BNN.mT).sum((1, 2)) / 2).clamp_min(0.0)
    return error_B / channels**2


def _adjacency_error(student_BCN: Tensor, teacher_BCN: Tensor) -> Tensor:
    """Return ``A_t - A_s`` (B, C, C) of rows of unit length."""
    return Gram.apply(teacher_BCN) - Gram.apply(student_BCN)
