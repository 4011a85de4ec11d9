"""Matching the channels relational graphs of a student and a teacher (arXiv 2405.08547).

The total is ``L_task + alpha L_V + beta L_E + gamma L_S`` [paper]. Each term is a mean over levels;
the terms of one level are in ``raygkd.losses.level_terms`` and ``raygkd.losses.batch_graph``.

Shape letters: B batch, C channels, O channels after the adapter, H height, W width, T terms,
d spectral dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor, nn

from raygkd.accelerated import AcceleratedBackend
from raygkd.errors import ConfigError
from raygkd.graph import (
    ATTENTION_MODES,
    PLAIN,
    WEIGHTS,
    ChannelGraphs,
    TeacherGraph,
    centred,
    choice_problem,
    dimension_problem,
    foreground_weights,
    nontrivial_pairs,
    require,
    share_problem,
    temperature_problem,
    weight_problems,
)
from raygkd.losses.adapters import ADAPTERS, Adapter, channel_moments, mixed, mixed_covariance
from raygkd.losses.batch_graph import batch_edge_loss, batch_spectral_loss
from raygkd.losses.level_terms import SPECTRAL_MODES, LevelMaps, in_full_precision
from raygkd.losses.levels import (
    Shape,
    coarser_grid,
    levels_problem,
    maps_problem,
    missing_levels_problem,
    pooled,
)

GRAPHS = ("batch", "image")


class GraphDistillationLoss(nn.Module):
    """The graph losses over several levels, with one adapter per level.

    An adapter is a 1x1 convolution from the student's channels to the teacher's, with or without
    batch normalisation after it. The finer of the two maps is average-pooled to the coarser grid.
    Adapters are trained with the student, but are not part of it. A term whose weight is 0 is not
    computed.

    Args:
        student_shapes: level -> (C, H, W) of the student's feature map.
        teacher_shapes: the same for the teacher, with the same levels.
        temperature: T > 0 of the attention.
        relative_temperature: whether T is relative to the maps, see ``softmax_masks``, or in units
            of the features.
        dim: spectral dimension, from 1 to C - 1 of the teacher at every level.
        alpha: weight of the vertex loss, not negative.
        beta: weight of the edge loss, not negative.
        gamma: weight of the spectral loss, not negative.
        mode: mode of ``spectral_loss``.
        attention: mode of ``edge_loss``.
        weights: graph weights of ``spectral_loss``.
        adapter: "plain", the convolution alone, or "normalised", with batch normalisation. With the
            latter, the largest stable step of SGD does not depend on the scale and the similarity
            of the student's maps, so alpha can be in the hundreds; but a sample's losses depend on
            its batch.
        graphs: "batch" for the edges and spectrum of one graph of the whole batch, see
            ``raygkd.losses.batch_graph``, or "image" for those of one graph per image, see
            ``edge_loss`` and ``spectral_loss``. ``mode``, ``attention`` and ``weights`` apply to
            the latter only.
        centre: compare maps whose channels are ``centred``, so that a channel's mean over the
            positions does not matter; a map with one position becomes zero, and its losses are 0.
        foreground: share of the objects' boxes in the weights of the vertex loss, from 0 to 1, see
            ``foreground_weights``; None weights all positions equally.
        canvas: side in pixels of both models' square input; ``foreground`` needs it.
        accelerated: use ``raygkd.accelerated``, which computes the same terms faster, but supports
            first-order gradients only and not ``torch.func``.

    Raises:
        ConfigError: invalid settings, all of them in one error.

    Source: [paper] several levels and three terms; adapters and the mean over levels are [ours].
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
        relative_temperature: bool = False,
        graphs: str = "image",
        centre: bool = False,
        foreground: float | None = None,
        canvas: int | None = None,
        accelerated: bool = True,
    ):
        super().__init__()
        term_weights = {"vertex": alpha, "edge": beta, "spectral": gamma}
        require(
            temperature_problem(temperature),
            choice_problem("spectral mode", mode, SPECTRAL_MODES),
            choice_problem("attention mode", attention, ATTENTION_MODES),
            choice_problem("graph weights", weights, WEIGHTS),
            choice_problem("adapter", adapter, ADAPTERS),
            choice_problem("graphs", graphs, GRAPHS),
            *weight_problems(alpha=alpha, beta=beta, gamma=gamma),
            *_level_problems(student_shapes, teacher_shapes, dim),
            *_foreground_problems(foreground, canvas),
        )
        self.student_shapes = dict(student_shapes)
        self.teacher_shapes = dict(teacher_shapes)
        self.temperature, self.relative_temperature = temperature, relative_temperature
        self.dim = dim
        self.mode, self.attention, self.weights = mode, attention, weights
        self.adapter, self.graphs, self.centre = adapter, graphs, centre
        self.foreground, self.canvas = foreground, canvas
        self.term_weights = {name: weight for name, weight in term_weights.items() if weight}
        self._backend = AcceleratedBackend() if accelerated else None
        self._operators = PLAIN if self._backend is None else self._backend.operators
        self.adapters = nn.ModuleDict(
            {
                str(level): Adapter(
                    shape[0], self.teacher_shapes[level][0], adapter, self._operators
                )
                for level, shape in self.student_shapes.items()
            }
        )
        if graphs == "batch" and not alpha and adapter == "normalised":
            # correlations do not depend on it, and DDP needs a gradient of every trained parameter
            for name, parameter in self.adapters.named_parameters():
                parameter.requires_grad_(not name.endswith("norm.bias"))

    @property
    def _per_sample_terms(self) -> list[str]:
        """Return the names of the terms that are means over samples."""
        return ["vertex"] if self.graphs == "batch" else list(self.term_weights)

    @property
    def takes_spectra(self) -> bool:
        """Whether the losses need the spectrum of each image's teacher graph."""
        return self.graphs == "image" and "spectral" in self.term_weights

    def teacher_graph(
        self, level: int, teacher_BCHW: Tensor, spectrum: tuple[Tensor, Tensor] | None = None
    ) -> TeacherGraph:
        """Return the teacher's input to the losses of a level.

        Args:
            level: level of the feature maps.
            teacher_BCHW: feature maps (B, C_t, H_t, W_t).
            spectrum: the spectrum that ``with_spectrum`` computed for the same maps, if available.
        """
        teacher_BCHW = self._on_grid(level, teacher_BCHW.detach())
        return TeacherGraph(centred(teacher_BCHW) if self.centre else teacher_BCHW, spectrum)

    def student_maps(self, level: int, student_BCHW: Tensor) -> Tensor:
        """Return a level's maps (B, C_t, H, W) in the form that is compared with the teacher's.

        They are pooled to the comparison grid, adapted, and centred if the loss centres.

        Args:
            level: level of the feature maps.
            student_BCHW: feature maps (B, C_s, H_s, W_s).
        """
        maps_BCHW = self.adapters[str(level)](self._on_grid(level, student_BCHW))
        return centred(maps_BCHW) if self.centre else maps_BCHW

    def _on_grid(self, level: int, maps_BCHW: Tensor) -> Tensor:
        """Average-pool the student's or teacher's maps of a level to the comparison grid."""
        return pooled(maps_BCHW, self._grid(level))

    def _grid(self, level: int) -> tuple[int, int]:
        return coarser_grid(self.student_shapes[level], self.teacher_shapes[level])

    def with_spectrum(self, graph: TeacherGraph) -> TeacherGraph:
        """Return a level's graph with its spectrum, for the graph weights of this loss."""
        graphs = ChannelGraphs(graph.maps_BCHW, self.weights, self._operators)
        return TeacherGraph(graph.maps_BCHW, graphs.spectrum())

    def forward(
        self,
        student_features: Mapping[int, Tensor],
        teacher: Mapping[int, Tensor] | Mapping[int, TeacherGraph],
        boxes: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return the unweighted terms, each a scalar averaged over the levels.

        Args:
            student_features: level -> feature maps (B, C_s, H_s, W_s).
            teacher: level -> feature maps (B, C_t, H_t, W_t), or ``teacher_graph`` of them.
            boxes: (M, 4) for each image, in pixels of the canvas; ``foreground`` needs them.

        Returns:
            those of "vertex", "edge" and "spectral" whose weight is not 0.

        Raises:
            ConfigError: a level is missing, its maps are not (B, C, H, W) of one batch, or
                ``foreground`` is set and there are no boxes.
        """
        self._require_maps(student_features, teacher)
        position_weights = self.position_weights(boxes)
        terms_T = self._mean_over_levels(student_features, teacher.__getitem__, position_weights)
        return dict(zip(self.term_weights, terms_T, strict=True))

    def begin(self, teacher: Mapping[int, Tensor] | Mapping[int, TeacherGraph]) -> None:
        """On a GPU, start the part of ``terms_with_gradient`` that needs the teacher alone.

        It runs in parallel with later work on the GPU, such as the student's forward pass.

        Args:
            teacher: the argument of the next ``terms_with_gradient``.
        """
        if self._backend is not None:
            self._backend.begin(self, teacher)

    def terms_with_gradient(
        self,
        student_features: Mapping[int, Tensor],
        teacher: MutableMapping[int, Tensor] | MutableMapping[int, TeacherGraph],
        boxes: Sequence[Tensor] | None = None,
        weights: Sequence[float] | None = None,
    ) -> dict[str, Tensor]:
        """Return the result of ``forward``, for a weighted sum whose weights are known.

        If accelerated, the gradient of that sum is computed with the terms, which saves a third of
        the work. Only that gradient is available, once, before the terms of the next batch are
        computed. On a GPU, in mode "residual" with up to 16 dimensions, the teacher's eigenpairs
        are computed by ``raygkd.accelerated.subspace``, and kernels are replayed.

        Args:
            student_features: see ``forward``.
            teacher: see ``forward``; levels are removed once processed, which frees their memory.
            boxes: see ``forward``.
            weights: weights of the terms in the sum, in their order; None for this loss's own.

        Raises:
            ConfigError: see ``forward``.
        """
        self._require_maps(student_features, teacher)
        weights = list(self.term_weights.values() if weights is None else weights)
        position_weights = self.position_weights(boxes)
        terms_T = None
        if self._backend is not None:
            terms_T = self._backend.replayed_terms(
                self, student_features, teacher, position_weights, weights
            )
        if terms_T is None:
            terms_T = self._mean_over_levels(
                student_features, teacher.pop, position_weights, weights
            )
        return dict(zip(self.term_weights, terms_T, strict=True))

    def _require_maps(
        self,
        student_features: Mapping[int, Tensor],
        teacher: Mapping[int, Tensor] | Mapping[int, TeacherGraph],
    ) -> None:
        """Raise ConfigError if a level is missing, or its maps cannot be compared."""
        shared = [level for level in student_features if level in teacher]
        require(missing_levels_problem(self.student_shapes, shared))
        for level in self.student_shapes:
            teacher_level = teacher[level]
            maps_BCHW = (
                teacher_level.maps_BCHW
                if isinstance(teacher_level, TeacherGraph)
                else teacher_level
            )
            require(maps_problem(level, student_features[level], maps_BCHW))

    @property
    def held_bytes(self) -> int:
        """Return the bytes of GPU memory held between calls, besides parameters and buffers."""
        return 0 if self._backend is None else self._backend.held_bytes

    def _mean_over_levels(
        self,
        student_features: Mapping[int, Tensor],
        teacher_of: Callable[[int], Tensor | TeacherGraph],
        position_weights: Mapping[int, Tensor],
        term_weights: Sequence[float] | None = None,
    ) -> Tensor:
        """Return the mean over the levels of ``level_terms`` (T,)."""
        terms = []
        for level in self.student_shapes:
            maps_BCHW, weights_BHW = student_features[level], position_weights.get(level)
            teacher = teacher_of(level)
            terms.append(self.level_terms(level, maps_BCHW, teacher, weights_BHW, term_weights))
        return torch.stack(terms).mean(0)

    def level_terms(
        self,
        level: int,
        student_BCHW: Tensor,
        teacher: Tensor | TeacherGraph,
        weights_BHW: Tensor | None,
        term_weights: Sequence[float] | None,
    ) -> Tensor:
        """Return the losses of one level (T,), averaged over the samples.

        Args:
            level: level of the feature maps.
            student_BCHW: feature maps (B, C_s, H_s, W_s).
            teacher: the teacher's feature maps, or ``teacher_graph`` of them.
            weights_BHW: position weights, see ``position_weights``.
            term_weights: weights of the terms, if only the gradient of this weighted sum will be
                needed; None otherwise.
        """
        if isinstance(teacher, Tensor):
            teacher = self.teacher_graph(level, teacher)
        student_BCHW = self._on_grid(level, student_BCHW)
        adapter = self.adapters[str(level)]
        assert isinstance(adapter, Adapter)
        if self.graphs == "batch" and self.term_weights.keys() != {"vertex"}:
            return self._with_batch_graph(
                adapter, student_BCHW, teacher.maps_BCHW, weights_BHW, term_weights
            )
        mixing = adapter.mixing(student_BCHW)
        return self._mean_over_samples(student_BCHW, mixing, teacher, weights_BHW, term_weights)

    def _with_batch_graph(
        self,
        adapter: Adapter,
        student_BCHW: Tensor,
        teacher_BCHW: Tensor,
        weights_BHW: Tensor | None,
        term_weights: Sequence[float] | None,
    ) -> Tensor:
        """Return the losses of one level (T,), with the edges and spectrum of the batch's graph."""
        compared_BCHW = centred(student_BCHW) if self.centre else student_BCHW
        moments = self._moments(adapter, compared_BCHW)
        mixing = adapter.mixing(student_BCHW, None if self.centre else moments)
        student_CC = mixed_covariance(moments[1], mixing[0])
        teacher_CC = self._moments(adapter, teacher_BCHW)[1]
        terms: list[Tensor] = []
        for number, name in enumerate(self.term_weights):
            if name == "vertex":
                weight = None if term_weights is None else term_weights[number : number + 1]
                graph = TeacherGraph(teacher_BCHW)
                terms.append(
                    self._mean_over_samples(student_BCHW, mixing, graph, weights_BHW, weight)[0]
                )
            elif name == "edge":
                terms.append(batch_edge_loss(student_CC, teacher_CC))
            else:
                terms.append(batch_spectral_loss(student_CC, teacher_CC, self.dim))
        return torch.stack(terms)

    def _moments(self, adapter: Adapter, maps_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``channel_moments`` in the common type of maps and adapter."""
        maps_BCHW, _ = in_full_precision(maps_BCHW, adapter.conv.weight)
        return channel_moments(maps_BCHW, self._operators)

    def _mean_over_samples(
        self,
        student_BCHW: Tensor,
        mixing: tuple[Tensor, Tensor],
        teacher: TeacherGraph,
        weights_BHW: Tensor | None,
        term_weights: Sequence[float] | None,
    ) -> Tensor:
        """Return the losses (T,) that are means over the samples."""
        tensors = in_full_precision(student_BCHW, *mixing)
        if self._backend is None:
            sums_T = self._sum_over_samples(teacher, weights_BHW, *tensors)
        else:
            sums_T = self._backend.over_samples(
                self._sum_over_samples, teacher, weights_BHW, term_weights, *tensors
            )
        return sums_T / len(student_BCHW)

    def _sum_over_samples(
        self,
        teacher: TeacherGraph,
        weights_BHW: Tensor | None,
        student_BCHW: Tensor,
        weight_OC: Tensor,
        bias_O: Tensor,
    ) -> Tensor:
        """Return the losses of one level (T,), summed over samples."""
        student_BCHW = mixed(student_BCHW, weight_OC, bias_O)
        if self.centre:
            student_BCHW = centred(student_BCHW)
        maps = LevelMaps(
            student_BCHW,
            teacher.maps_BCHW,
            self.temperature,
            self._operators,
            relative=self.relative_temperature,
        )
        terms: list[Tensor] = []
        for name in self._per_sample_terms:
            if name == "vertex":
                terms.append(maps.vertex(weights_BHW).sum())
            elif name == "edge":
                terms.append(maps.edge(self.attention).sum())
            else:
                terms.append(
                    maps.spectral(self.dim, self.mode, self.weights, teacher.spectrum).sum()
                )
        return torch.stack(terms)

    def position_weights(self, boxes: Sequence[Tensor] | None) -> dict[int, Tensor]:
        """Return level -> position weights (B, H, W); empty if all positions count equally.

        Args:
            boxes: (M, 4) for each image, in pixels of the canvas.

        Raises:
            ConfigError: ``foreground`` is set, but there are no boxes.
        """
        if self.foreground is None or self.canvas is None or "vertex" not in self.term_weights:
            return {}
        if boxes is None:
            raise ConfigError("foreground weighting needs boxes; omit it, or train a detector")
        return {
            level: foreground_weights(boxes, self.canvas, self._grid(level), self.foreground)
            for level in self.student_shapes
        }

    def describe(self) -> list[dict[str, object]]:
        """Return one row per level for a table: shapes, common grid, adapter, spectral dimension.

        "spectral_pairs" is how many of the "spectral_dim" pairs can be non-zero.
        """
        suffix = ", batch norm" if self.adapter == "normalised" else ""
        rows: list[dict[str, object]] = []
        for level, student in self.student_shapes.items():
            teacher = self.teacher_shapes[level]
            height, width = coarser_grid(student, teacher)
            if self.graphs == "batch":
                # a batch has more positions than channels
                pairs = teacher[0] - 1
            else:
                # centring removes one dimension
                pairs = nontrivial_pairs(teacher[0], height * width - self.centre, self.weights)
            rows.append(
                {
                    "level": level,
                    "student_shape": student,
                    "teacher_shape": teacher,
                    "grid": (height, width),
                    "adapter": f"1x1 conv {student[0]} -> {teacher[0]}{suffix}",
                    "spectral_dim": self.dim,
                    "spectral_pairs": min(self.dim, pairs),
                }
            )
        return rows


def _foreground_problems(foreground: float | None, canvas: int | None) -> list[str]:
    """Return the problems of foreground weighting."""
    if foreground is None:
        return []
    problems = [share_problem(foreground)]
    if canvas is None:
        problems.append("foreground weighting needs canvas, the side of the images in pixels")
    return [problem for problem in problems if problem]


def _level_problems(
    student_shapes: Mapping[int, Shape], teacher_shapes: Mapping[int, Shape], dim: int
) -> list[str]:
    """Return the problems of the levels, and of the spectral dimension at each level."""
    problem = levels_problem(student_shapes, teacher_shapes)
    if problem:
        return [problem]
    fewest = min(shape[0] for shape in teacher_shapes.values())
    problem = dimension_problem(dim, fewest)
    if problem is None:
        return []
    narrowest = [
        str(level) for level in sorted(teacher_shapes) if teacher_shapes[level][0] == fewest
    ]
    return [f"level{'s' if len(narrowest) > 1 else ''} {', '.join(narrowest)}: {problem}"]
