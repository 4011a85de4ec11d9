"""Matching the channels relational graphs of a student and a teacher (arXiv 2405.08547).

The total is ``L_task + alpha L_V + beta L_E + gamma L_S`` [paper]; the terms' formulas are [ours].
Every loss is a mean over samples of what depends on one sample alone, so that steps over parts of
a batch average to the step over the whole batch. The teacher never gets a gradient.

Shape letters: B batch, C channels, H height, W width, d spectral dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raygkd.errors import ConfigError
from raygkd.graph import (
    ATTENTION_MODES,
    WEIGHTS,
    adjacency,
    attention_masks,
    centred,
    choice_problem,
    deflated_factor,
    dimension_problem,
    embedding_from_spectrum,
    foreground_weights,
    full_precision,
    graph_spectrum,
    nontrivial_pairs,
    relational_attention,
    require,
    shape_problem,
    share_problem,
    spectral_embedding,
    temperature_problem,
    weight_problems,
)
from raygkd.losses.features import NormalisedConvolution
from raygkd.losses.levels import Shape, coarser_grid, levels_problem, pooled
from raygkd.losses.spectral import (
    procrustes_distance,
    relative_to_teacher,
    residual_distance,
    subspace_distance,
)

SPECTRAL_MODES = ("residual", "subspace", "procrustes")
ADAPTERS = ("plain", "normalised")


@full_precision
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
    require(shape_problem("feature maps", student_BCHW, teacher_BCHW))
    teacher_BCHW = teacher_BCHW.detach()
    spatial_B1HW, channel_BC = attention_masks(teacher_BCHW, temperature)
    if weights_BHW is not None:
        spatial_B1HW = spatial_B1HW * weights_BHW[:, None]
    error_BCHW = (teacher_BCHW - student_BCHW).square() * spatial_B1HW
    error_B = (error_BCHW * channel_BC[:, :, None, None]).mean((1, 2, 3))
    return relative_to_teacher(error_B, teacher_BCHW.square().mean((1, 2, 3))).mean()


@full_precision
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
    require(shape_problem("feature maps", student_BCHW, teacher_BCHW))
    teacher_BCHW = teacher_BCHW.detach()
    weights_BCC = relational_attention(teacher_BCHW, temperature, attention)
    difference_BCC = adjacency(teacher_BCHW) - adjacency(student_BCHW)
    return (weights_BCC * difference_BCC.square()).mean()


@full_precision
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
    require(
        shape_problem("feature maps", student_BCHW, teacher_BCHW),
        choice_problem("spectral mode", mode, SPECTRAL_MODES),
    )
    teacher = spectral_embedding(teacher_BCHW.detach(), dim, weights)
    return _spectral_distance(student_BCHW, teacher, mode, weights)


def _spectral_distance(
    student_BCHW: Tensor, teacher: tuple[Tensor, Tensor], mode: str, weights: str
) -> Tensor:
    """Return ``spectral_loss`` against an embedding, values (B, d) and vectors (B, C, d)."""
    if mode == "residual":
        return residual_distance(deflated_factor(student_BCHW, weights), *teacher).mean()
    student = spectral_embedding(student_BCHW, teacher[0].shape[1], weights)
    if mode == "subspace":
        return subspace_distance(*student, *teacher).mean()
    return procrustes_distance(*student, *teacher).mean()


@dataclass(frozen=True)
class TeacherGraph:
    """What the losses of one level take of the teacher, at any temperature and dimension.

    Masks and adjacency are not held but follow from the maps: masks cost next to nothing, and an
    adjacency has the size of a basis at a fifth of its arithmetic.

    Attributes:
        maps_BCHW: on the grid of the comparison, centred where the loss centres.
        spectrum: what ``graph_spectrum`` gives of the maps, where it is known.
    """

    maps_BCHW: Tensor
    spectrum: tuple[Tensor, Tensor] | None = None

    def embedding(self, dim: int, weights: str) -> tuple[Tensor, Tensor]:
        """Return ``spectral_embedding`` of the maps; a known spectrum must be of the weights."""
        if self.spectrum is None:
            return spectral_embedding(self.maps_BCHW, dim, weights)
        return embedding_from_spectrum(self.maps_BCHW, *self.spectrum, dim, weights)


class GraphDistillationLoss(nn.Module):
    """The graph losses over several levels, with one adapter per level.

    An adapter is a 1x1 convolution from the student's channels to the teacher's, with or without
    batch normalisation behind it. The finer of both maps is average-pooled to the coarser grid.
    Adapters train with the student and are no part of it. A term whose weight is 0 is not computed.

    Args:
        student_shapes: level -> (C, H, W) of the student's feature map.
        teacher_shapes: the same of the teacher, for the same levels.
        temperature: T > 0 of the attention.
        dim: spectral dimension, from 1 to C - 1 of the teacher at every level.
        alpha: weight of the vertex loss, not negative.
        beta: weight of the edge loss, not negative.
        gamma: weight of the spectral loss, not negative.
        mode: mode of ``spectral_loss``.
        attention: mode of ``edge_loss``.
        weights: graph weights of ``spectral_loss``.
        adapter: "plain", the convolution alone, or "normalised", where the step that SGD can take
            without diverging does not depend on how large and how alike the student's maps are, so
            that alpha can be in the hundreds. A sample's losses then depend on its batch.
        centre: compare maps whose channels are ``centred``, so that what a channel has everywhere
            counts for nothing; of a map of one position nothing is left, and its losses are 0.
        foreground: share of the objects' boxes in the weights of the vertex loss, from 0 to 1, see
            ``foreground_weights``; None weighs all positions alike.
        canvas: side in pixels of the square that both models see; ``foreground`` needs it.

    Raises:
        ConfigError: wrong settings, all of them in one error.

    Source: [paper] several levels and three terms; adapters and average over levels are [ours].
    """

    def __init__(
        self,
        student_shapes: Mapping[int, Shape],
        teacher_shapes: Mapping[int, Shape],
        *,
        temperature: float,
        dim: int,
        alpha: float,
        beta: float,
        gamma: float,
        mode: str = "residual",
        attention: str = "outer",
        weights: str = "shifted",
        adapter: str = "plain",
        centre: bool = False,
        foreground: float | None = None,
        canvas: int | None = None,
    ):
        super().__init__()
        term_weights = {"vertex": alpha, "edge": beta, "spectral": gamma}
        require(
            temperature_problem(temperature),
            choice_problem("spectral mode", mode, SPECTRAL_MODES),
            choice_problem("attention mode", attention, ATTENTION_MODES),
            choice_problem("graph weights", weights, WEIGHTS),
            choice_problem("adapter", adapter, ADAPTERS),
            *weight_problems(alpha=alpha, beta=beta, gamma=gamma),
            *_level_problems(student_shapes, teacher_shapes, dim),
            *_foreground_problems(foreground, canvas),
        )
        self.student_shapes = dict(student_shapes)
        self.teacher_shapes = dict(teacher_shapes)
        self.temperature, self.dim = temperature, dim
        self.mode, self.attention, self.weights = mode, attention, weights
        self.adapter, self.centre = adapter, centre
        self.foreground, self.canvas = foreground, canvas
        self.term_weights = {name: weight for name, weight in term_weights.items() if weight}
        self.adapters = nn.ModuleDict(
            {
                str(level): _adapter(shape[0], self.teacher_shapes[level][0], adapter)
                for level, shape in self.student_shapes.items()
            }
        )

    def teacher_graph(
        self, level: int, teacher_BCHW: Tensor, spectrum: tuple[Tensor, Tensor] | None = None
    ) -> TeacherGraph:
        """Return what the losses of a level take of the teacher.

        Args:
            level: of the feature maps.
            teacher_BCHW: feature maps (B, C_t, H_t, W_t).
            spectrum: what ``with_spectrum`` has found of the same maps, where it is known.
        """
        grid = coarser_grid(self.student_shapes[level], self.teacher_shapes[level])
        teacher_BCHW = pooled(teacher_BCHW.detach(), grid)
        return TeacherGraph(centred(teacher_BCHW) if self.centre else teacher_BCHW, spectrum)

    def student_maps(self, level: int, student_BCHW: Tensor) -> Tensor:
        """Return a level's maps (B, C_t, H, W) as the losses compare them with the teacher's.

        They have gone through the adapter, on the grid of the comparison, and are centred where
        the loss centres.

        Args:
            level: of the feature maps.
            student_BCHW: feature maps (B, C_s, H_s, W_s).
        """
        grid = coarser_grid(self.student_shapes[level], self.teacher_shapes[level])
        maps_BCHW = self.adapters[str(level)](pooled(student_BCHW, grid))
        return centred(maps_BCHW) if self.centre else maps_BCHW

    def with_spectrum(self, graph: TeacherGraph) -> TeacherGraph:
        """Return a level's graph with its spectrum, of the weights that this loss has."""
        return TeacherGraph(graph.maps_BCHW, graph_spectrum(graph.maps_BCHW, self.weights))

    def forward(
        self,
        student_features: Mapping[int, Tensor],
        teacher: Mapping[int, Tensor] | Mapping[int, TeacherGraph],
        boxes: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return the unweighted terms, each a scalar averaged over the levels.

        Args:
            student_features: level -> feature maps (B, C_s, H_s, W_s).
            teacher: level -> feature maps (B, C_t, H_t, W_t), or what ``teacher_graph`` makes of
                them.
            boxes: of each image, (M, 4) in pixels of the canvas; ``foreground`` needs them.

        Returns:
            "vertex", "edge" and "spectral", as far as their weight is not 0.

        Raises:
            ConfigError: ``foreground`` is set, and there are no boxes.
        """
        totals: dict[str, list[Tensor]] = {name: [] for name in self.term_weights}
        for level in self.student_shapes:
            of_teacher = teacher[level]
            if isinstance(of_teacher, Tensor):
                of_teacher = self.teacher_graph(level, of_teacher)
            student_BCHW = self.student_maps(level, student_features[level])
            for name, terms in totals.items():
                terms.append(self._term(name, student_BCHW, of_teacher, boxes))
        return {name: torch.stack(terms).mean() for name, terms in totals.items()}

    def _term(
        self,
        name: str,
        student_BCHW: Tensor,
        teacher: TeacherGraph,
        boxes: Sequence[Tensor] | None,
    ) -> Tensor:
        """Return one loss of one level."""
        teacher_BCHW = teacher.maps_BCHW
        if name == "vertex":
            weights_BHW = self._position_weights(boxes, teacher_BCHW)
            return vertex_loss(student_BCHW, teacher_BCHW, self.temperature, weights_BHW)
        if name == "edge":
            return edge_loss(student_BCHW, teacher_BCHW, self.temperature, self.attention)
        embedding = teacher.embedding(self.dim, self.weights)
        return _spectral_distance(student_BCHW, embedding, self.mode, self.weights)

    def _position_weights(
        self, boxes: Sequence[Tensor] | None, teacher_BCHW: Tensor
    ) -> Tensor | None:
        """Return the weights of the level's positions (B, H, W), None where all count alike."""
        if self.foreground is None or self.canvas is None:
            return None
        if boxes is None:
            raise ConfigError("foreground weighting needs boxes: leave it out, or train a detector")
        height, width = teacher_BCHW.shape[2:]
        return foreground_weights(boxes, self.canvas, (height, width), self.foreground)

    def describe(self) -> list[dict[str, object]]:
        """Return one row per level for a table: shapes, common grid, adapter, spectral dimension.

        "spectral_pairs" is how many of the "spectral_dim" pairs the grid can give; the others are
        zero.
        """
        rows: list[dict[str, object]] = []
        behind = ", batch norm" if self.adapter == "normalised" else ""
        for level, student in self.student_shapes.items():
            teacher = self.teacher_shapes[level]
            height, width = coarser_grid(student, teacher)
            # centred channels lie in a space of one dimension less
            pairs = nontrivial_pairs(teacher[0], height * width - self.centre, self.weights)
            rows.append(
                {
                    "level": level,
                    "student_shape": student,
                    "teacher_shape": teacher,
                    "grid": (height, width),
                    "adapter": f"1x1 conv {student[0]} -> {teacher[0]}{behind}",
                    "spectral_dim": self.dim,
                    "spectral_pairs": min(self.dim, pairs),
                }
            )
        return rows


def _adapter(student_channels: int, teacher_channels: int, kind: str) -> nn.Module:
    """Return a 1x1 convolution that starts as the identity, folded or repeated to fit.

    Batch normalisation follows where the kind is "normalised".

    Each output starts as the mean of the inputs of the same place, counted modulo the smaller
    width. The first graph is so the student's own; random signs would make antipodal channels
    out of the non-negative maps of a ReLU, far from any teacher's.
    """
    adapter = NormalisedConvolution(student_channels, teacher_channels)
    width = min(student_channels, teacher_channels)
    place_out = torch.arange(teacher_channels)[:, None] % width
    place_in = torch.arange(student_channels)[None, :] % width
    shared = (place_out == place_in).float()
    with torch.no_grad():
        adapter[0].weight.copy_((shared / shared.sum(1, keepdim=True))[:, :, None, None])
    return adapter if kind == "normalised" else adapter[0]


def _foreground_problems(foreground: float | None, canvas: int | None) -> list[str]:
    """Return what is wrong with the weighting by boxes."""
    if foreground is None:
        return []
    problems = [share_problem(foreground)]
    if canvas is None:
        problems.append("foreground weighting needs canvas, the side of the images in pixels")
    return [problem for problem in problems if problem]


def _level_problems(
    student_shapes: Mapping[int, Shape], teacher_shapes: Mapping[int, Shape], dim: int
) -> list[str]:
    """Return what is wrong with the levels and with the spectral dimension at each of them."""
    problem = levels_problem(student_shapes, teacher_shapes)
    if problem:
        return [problem]
    fewest = min(shape[0] for shape in teacher_shapes.values())
    problem = dimension_problem(dim, fewest)
    if problem is None:
        return []
    narrow = [str(level) for level in sorted(teacher_shapes) if teacher_shapes[level][0] == fewest]
    return [f"level{'s' if len(narrow) > 1 else ''} {', '.join(narrow)}: {problem}"]
