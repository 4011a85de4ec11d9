"""The terms of one level: three distances between the channels relational graphs of two maps.

The formulas are [ours]; aligning vertices, edges and a spectral embedding under attention is the
paper's idea (arXiv 2405.08547). Every loss is a mean over samples of terms that depend on a single
sample, so results for parts of a batch average to the result for the whole batch. The teacher gets
no gradient.

Shape letters: B batch, C channels, H height, W width, N = H * W positions, d spectral dimension.
"""

from __future__ import annotations

import functools

from torch import Tensor

from raygkd.graph import (
    ATTENTION_MODES,
    PLAIN,
    ChannelGraphs,
    Operators,
    attention_masks,
    choice_problem,
    full_precision,
    relational_attention,
    require,
    shape_problem,
    temperature_problem,
)
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
    its weight is comparable across layers. A sample whose teacher map is zero counts as 0.

    Args:
        student_BCHW: feature maps (B, C, H, W), already of the teacher's shape.
        teacher_BCHW: feature maps (B, C, H, W).
        temperature: T > 0 of the attention, in units of the features.
        weights_BHW: position weights (B, H, W) that multiply a_S, with a mean of 1 over the
            positions of a sample, see ``foreground_weights``; None for 1 everywhere.

    Returns:
        A scalar without unit.

    Raises:
        ConfigError: the shapes differ, or the temperature is not above 0.

    Source: [paper] alignment of vertices under attention; the formula is [ours].
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

    Source: [paper] alignment of edges under relational attention; the formula is [ours].
    """
    return LevelMaps(student_BCHW, teacher_BCHW, temperature).edge(attention).mean()


def spectral_loss(
    student_BCHW: Tensor,
    teacher_BCHW: Tensor,
    dim: int,
    mode: str = "residual",
    weights: str = "shifted",
) -> Tensor:
    """Return the distance between the spectral embeddings of both graphs, averaged over samples.

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

    Source: [paper] alignment of a spectral embedding; the formulas are [ours].
    """
    return LevelMaps(student_BCHW, teacher_BCHW).spectral(dim, mode, weights).mean()


class LevelMaps:
    """The maps of one level; intermediate results that several losses share are computed once.

    Args:
        student_BCHW: feature maps (B, C, H, W), already of the teacher's shape.
        teacher_BCHW: feature maps (B, C, H, W).
        temperature: T > 0 of the attention.
        operators: implementation of the tensor operations.
        relative: whether T is relative to the maps, see ``softmax_masks``.

    Raises:
        ConfigError: the shapes differ, or the temperature is not above 0.
    """

    def __init__(
        self,
        student_BCHW: Tensor,
        teacher_BCHW: Tensor,
        temperature: float = 1.0,
        operators: Operators = PLAIN,
        *,
        relative: bool = False,
    ):
        require(
            shape_problem("feature maps", student_BCHW, teacher_BCHW),
            temperature_problem(temperature),
        )
        self.student_BCHW, self.teacher_BCHW = in_full_precision(
            student_BCHW, teacher_BCHW.detach()
        )
        self._temperature, self._relative = temperature, relative
        self._operators = operators

    @functools.cached_property
    def _masks(self) -> tuple[Tensor, Tensor]:
        return attention_masks(self.teacher_BCHW, self._temperature, relative=self._relative)

    @functools.cached_property
    def _graphs(self) -> tuple[ChannelGraphs, ChannelGraphs]:
        return self._graphs_of("shifted")

    def _graphs_of(self, weights: str) -> tuple[ChannelGraphs, ChannelGraphs]:
        return (
            ChannelGraphs(self.student_BCHW, weights, self._operators),
            ChannelGraphs(self.teacher_BCHW, weights, self._operators),
        )

    def vertex(self, weights_BHW: Tensor | None = None) -> Tensor:
        """Return ``vertex_loss`` of each sample (B,)."""
        spatial_B1HW, channel_BC = self._masks
        if weights_BHW is not None:
            spatial_B1HW = spatial_B1HW * weights_BHW[:, None]
        return _vertex_distance(
            self.student_BCHW, self.teacher_BCHW, spatial_B1HW, channel_BC, self._operators
        )

    def edge(self, attention: str = "outer") -> Tensor:
        """Return ``edge_loss`` of each sample (B,)."""
        require(choice_problem("attention mode", attention, ATTENTION_MODES))
        student, teacher = self._graphs
        if attention == "softmax":
            weights_BCC = relational_attention(
                self.teacher_BCHW, self._temperature, attention, relative=self._relative
            )
            return _weighted_edges(student.adjacency_BCC, teacher.adjacency_BCC, weights_BCC)
        channel_BC = self._masks[1]
        if student.dense:
            return _outer_edges(student.adjacency_BCC, teacher.adjacency_BCC, channel_BC)
        return _outer_edges_of_rows(student.rows_BCN, teacher.rows_BCN, channel_BC, self._operators)

    def spectral(
        self, dim: int, mode: str, weights: str, spectrum: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Return ``spectral_loss`` of each sample (B,).

        Args:
            dim: spectral dimension d, from 1 to C - 1.
            mode: see ``spectral_loss``.
            weights: see ``spectral_loss``.
            spectrum: the teacher's ``ChannelGraphs.spectrum``, if already computed.
        """
        require(choice_problem("spectral mode", mode, SPECTRAL_MODES))
        # the edge loss uses shifted weights, too
        student, teacher = self._graphs if weights == "shifted" else self._graphs_of(weights)
        embedding = teacher.embedding(dim, spectrum)
        if mode == "residual":
            return residual_distance(student.times(embedding[1]), *embedding)
        distance = subspace_distance if mode == "subspace" else procrustes_distance
        return distance(*student.embedding(dim), *embedding)


@full_precision
def in_full_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors in their common type, at least float32."""
    return tensors


@full_precision
def _vertex_distance(
    student_BCHW: Tensor,
    teacher_BCHW: Tensor,
    spatial_B1HW: Tensor,
    channel_BC: Tensor,
    operators: Operators,
) -> Tensor:
    """Return the relative squared error of each sample (B,), under both masks."""
    weights_BN1 = spatial_B1HW.flatten(2).mT
    error_BC, power_B = operators.squared_errors(
        student_BCHW.flatten(2), teacher_BCHW.flatten(2), weights_BN1
    )
    error_B = (error_BC * channel_BC).mean(1) / weights_BN1.shape[1]
    return relative_to_teacher(error_B, power_B)


@full_precision
def _weighted_edges(student_BCC: Tensor, teacher_BCC: Tensor, weights_BCC: Tensor) -> Tensor:
    """Return ``mean_ij R_ij (A_t,ij - A_s,ij)^2`` of each sample (B,)."""
    return (weights_BCC * (teacher_BCC - student_BCC).square()).mean((1, 2))


@full_precision
def _outer_edges(student_BCC: Tensor, teacher_BCC: Tensor, channel_BC: Tensor) -> Tensor:
    """Return ``mean_ij a_i a_j (A_t,ij - A_s,ij)^2`` of each sample (B,)."""
    squares_BCC = (teacher_BCC - student_BCC).square()
    error_B = ((squares_BCC * channel_BC[:, None, :]).sum(2) * channel_BC).sum(1)
    return error_B / channel_BC.shape[1] ** 2


@full_precision
def _outer_edges_of_rows(
    student_BCN: Tensor, teacher_BCN: Tensor, channel_BC: Tensor, operators: Operators
) -> Tensor:
    """Return ``_outer_edges`` of the adjacencies of rows, without forming any C x C matrix.

    With rows ``Y = a^1/2 X``, ``P = Y_t - Y_s`` and ``Q = Y_t + Y_s``, the difference of the
    weighted adjacencies is ``(P Q^T + Q P^T) / 2``. Its squared norm is half the sum of the entries
    of ``P^T P * Q^T Q + P^T Q * Q^T P``. Unlike a difference of three norms, it keeps its precision
    if both graphs are nearly equal.
    """
    root_BC1 = channel_BC.sqrt()[:, :, None]
    student_BCN, teacher_BCN = student_BCN * root_BC1, teacher_BCN * root_BC1
    difference_BCN, sum_BCN = teacher_BCN - student_BCN, teacher_BCN + student_BCN
    mixed_BNN = difference_BCN.mT @ sum_BCN
    even_BNN = operators.gram(difference_BCN.mT) * operators.gram(sum_BCN.mT)
    # the parts cancel if the graphs are equal, and rounding can make their sum slightly negative
    error_B = ((even_BNN + mixed_BNN * mixed_BNN.mT).sum((1, 2)) / 2).clamp_min(0.0)
    return error_B / channel_BC.shape[1] ** 2
