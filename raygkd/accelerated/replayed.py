"""The graph losses and their gradient on a GPU: two CUDA graphs with eigenproblems in between.

Shape letters: B batch, C channels, H height, W width, Q vectors of a basis, X matrices of all
levels, T terms, P side of a square matrix, d spectral dimension.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from raygkd.accelerated.captured import Captured, on_parallel_streams
from raygkd.accelerated.fast_operators import FAST
from raygkd.accelerated.parts import common_ratio, filled
from raygkd.accelerated.subspace import LARGEST_COUNT, leading_subspace
from raygkd.graph import ChannelGraphs, TeacherGraph

Teacher = Mapping[int, Tensor] | Mapping[int, TeacherGraph]


class LevelLoss(Protocol):
    """The interface of ``raygkd.losses.GraphDistillationLoss`` that is used here."""

    adapters: nn.ModuleDict
    term_weights: dict[str, float]
    student_shapes: dict[int, tuple[int, int, int]]
    dim: int
    mode: str
    weights: str
    training: bool

    @property
    def takes_spectra(self) -> bool:
        """Whether the loss needs the spectrum of each image's teacher graph."""

    def teacher_graph(
        self, level: int, teacher_BCHW: Tensor, spectrum: tuple[Tensor, Tensor] | None = None
    ) -> TeacherGraph:
        """Return the teacher's graph at a level."""

    def level_terms(
        self,
        level: int,
        student_BCHW: Tensor,
        teacher: Tensor | TeacherGraph,
        weights_BHW: Tensor | None,
        term_weights: Sequence[float] | None,
    ) -> Tensor:
        """Return the terms of a level (T,), averaged over the samples."""


def can_be_replayed(loss: LevelLoss, features: Teacher) -> bool:
    """Return whether ``ReplayedTerms`` supports a loss.

    It must be on a GPU, and must not need eigenvectors of the student.
    """
    products_alone = "spectral" not in loss.term_weights or (
        loss.takes_spectra and loss.mode == "residual" and loss.dim <= LARGEST_COUNT
    )
    return products_alone and all(_maps(of_level).is_cuda for of_level in features.values())


class ReplayedTerms:
    """The terms of a graph loss, with the gradient of their weighted sum.

    The first CUDA graph reduces the teacher's maps to a small matrix for each image and level, and
    all these matrices are decomposed at once. The second graph computes terms and gradients from
    the maps of both sides. A copy starts without graphs.

    Attributes:
        calls: number of calls so far.
    """

    def __init__(self) -> None:
        self._captured = Captured()
        self._side_stream: torch.cuda.Stream | None = None
        self._pending: tuple[Teacher, list[Tensor]] | None = None
        self.calls = 0

    def __reduce__(self) -> tuple[type[ReplayedTerms], tuple[()]]:
        """Copy and pickle without the graphs."""
        return ReplayedTerms, ()

    @property
    def nbytes(self) -> int:
        """Return the memory that the graphs hold between calls, in bytes."""
        return self._captured.nbytes

    def begin(self, loss: LevelLoss, teacher: Teacher) -> None:
        """Start the computations that need the teacher alone, on a parallel stream."""
        self._pending = None
        graphs = [level for level in teacher.values() if isinstance(level, TeacherGraph)]
        have_spectra = any(graph.spectrum is not None for graph in graphs)
        if have_spectra or "spectral" not in loss.term_weights:
            return
        function = functools.partial(subspaces, loss, bool(graphs))
        maps = [_maps(teacher[level]) for level in loss.student_shapes]
        with torch.cuda.stream(self._start_side_stream(maps[0])):
            bases_and_matrices = self._captured(function, maps, key=("subspaces", bool(graphs)))
        self._pending = teacher, list(bases_and_matrices)

    def _start_side_stream(self, maps: Tensor) -> torch.cuda.Stream | None:
        """Return a second stream that waits for the current one's work so far; None on a CPU."""
        if not maps.is_cuda:
            return None
        self._side_stream = self._side_stream or torch.cuda.Stream(maps.device)
        self._side_stream.wait_stream(torch.cuda.current_stream(maps.device))
        return self._side_stream

    def __call__(
        self,
        loss: LevelLoss,
        student_features: Mapping[int, Tensor],
        teacher: MutableMapping[int, Tensor] | MutableMapping[int, TeacherGraph],
        position_weights: Mapping[int, Tensor],
        weights: Sequence[float],
    ) -> Tensor:
        """Return the terms (T,), averaged over levels and samples.

        Args:
            loss: the loss to compute.
            student_features: level -> feature maps (B, C_s, H_s, W_s).
            teacher: level -> feature maps (B, C_t, H_t, W_t), or graph; the levels are removed.
            position_weights: level -> position weights, or empty.
            weights: weights of the terms in the sum whose gradient is computed.
        """
        if self._pending is None or self._pending[0] is not teacher:
            self.begin(loss, teacher)
        pairs = self._wait_for_eigenpairs()
        teachers = [teacher.pop(level) for level in loss.student_shapes]
        spectra = [t.spectrum for t in teachers if isinstance(t, TeacherGraph) and t.spectrum]
        if spectra and "spectral" in loss.term_weights:
            pairs = [part[..., : loss.dim] for spectrum in spectra for part in spectrum]
        form = (isinstance(teachers[0], TeacherGraph), bool(spectra), bool(position_weights))
        constants = [*map(_maps, teachers), *pairs, *position_weights.values()]
        students = [student_features[level] for level in loss.student_shapes]
        function = functools.partial(terms_and_gradients, loss, weights, *form)
        parameters = list(loss.adapters.parameters())
        state = [*parameters, *loss.adapters.buffers()]
        addresses = (tensor.data_ptr() for tensor in state)
        key = ("terms", *form, *weights, loss.training, *addresses)

        def run(*students: Tensor) -> tuple[Tensor, ...]:
            return self._captured(function, [*students, *constants], key)

        self.calls += 1
        return _Replay.apply(self, run, weights, len(students), *students, *parameters)

    def _wait_for_eigenpairs(self) -> list[Tensor]:
        """Wait for the bases; return eigenpairs of the small matrices, and the bases."""
        if self._pending is None:
            return []
        *bases, matrices_XQQ = self._pending[1]
        self._pending = None
        with torch.cuda.stream(self._side_stream):
            pairs = torch.linalg.eigh(matrices_XQQ)
        if self._side_stream is not None:
            torch.cuda.current_stream().wait_stream(self._side_stream)
        return [*pairs, *bases]


class _Replay(torch.autograd.Function):
    """Terms whose gradient is already computed, in memory that the next call overwrites."""

    @staticmethod
    def forward(
        ctx: Any,
        replayed: ReplayedTerms,
        run: Callable[..., tuple[Tensor, ...]],
        weights: Sequence[float],
        count: int,
        *inputs: Tensor,
    ) -> Tensor:
        """Return the terms (T,).

        Args:
            replayed: the caller.
            run: student's maps -> terms, and the gradient of their weighted sum with respect to all
                inputs.
            weights: weights of the terms.
            count: number of inputs that are maps.
            inputs: the student's maps and the adapters' parameters.
        """
        terms_T, *ctx.gradients = run(*inputs[:count])
        ctx.replayed, ctx.call, ctx.weights = replayed, replayed.calls, weights
        return terms_T.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the inputs.

        Raises:
            RuntimeError: the terms of another batch were computed since.
        """
        if ctx.replayed.calls != ctx.call:
            raise RuntimeError("backward must run before the terms of the next batch are computed")
        ratio = common_ratio(grad_T, ctx.weights)
        return None, None, None, None, *(gradient * ratio for gradient in ctx.gradients)


def _maps(teacher: Tensor | TeacherGraph) -> Tensor:
    return teacher.maps_BCHW if isinstance(teacher, TeacherGraph) else teacher


def subspaces(loss: LevelLoss, have_graphs: bool, *maps: Tensor) -> tuple[Tensor, ...]:
    """Return ``leading_subspace`` of the teacher's graphs.

    Args:
        loss: the loss that defines the levels.
        have_graphs: whether the maps come from a ``TeacherGraph``.
        maps: the maps of each level.

    Returns:
        a basis (B, P, Q) for each level, and all small matrices (X, Q, Q), padded to the size of
        the largest.
    """

    def level_subspace(level: int, maps_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        if not have_graphs:
            maps_BCHW = loss.teacher_graph(level, maps_BCHW).maps_BCHW
        return leading_subspace(ChannelGraphs(maps_BCHW, loss.weights, FAST).smaller_matrix())

    results = on_parallel_streams(
        functools.partial(level_subspace, *pair)
        for pair in zip(loss.student_shapes, maps, strict=True)
    )
    side = max(ritz_BQQ.shape[1] for _, ritz_BQQ in results)
    matrices = torch.cat([_padded(ritz_BQQ, side) for _, ritz_BQQ in results])
    return *(basis_BPQ for basis_BPQ, _ in results), matrices


def _padded(matrix_BQQ: Tensor, side: int) -> Tensor:
    """Return matrices padded so that the extra eigenvalues are lower than all others."""
    batch, size = matrix_BQQ.shape[:2]
    padded = matrix_BQQ.new_zeros(batch, side, side)
    padded[:, :size, :size] = matrix_BQQ
    padded.diagonal(dim1=1, dim2=2)[:, size:] = -1.0
    return padded


def terms_and_gradients(
    loss: LevelLoss,
    term_weights: Sequence[float],
    have_graphs: bool,
    have_spectra: bool,
    have_position_weights: bool,
    *inputs: Tensor,
) -> tuple[Tensor, ...]:
    """Return the terms of a loss (T,), and the gradient of their weighted sum.

    Args:
        loss: the loss to compute.
        term_weights: weights of the terms in the sum.
        have_graphs: whether the teacher's maps come from a ``TeacherGraph``.
        have_spectra: whether the eigenpairs come from a ``TeacherGraph``.
        have_position_weights: whether there are position weights.
        inputs: for each level, the student's maps; the teacher's maps; the teacher's eigenvalues
            and vectors if available, otherwise those of the matrices from ``subspaces``, followed
            by the bases; position weights.

    Returns:
        the terms, and the gradients of the student's maps and of the adapters' parameters.
    """
    levels, remaining = list(loss.student_shapes), iter(inputs)
    students = list(itertools.islice(remaining, len(levels)))
    teachers = list(itertools.islice(remaining, len(levels)))
    spectra: list[tuple[Tensor, Tensor] | None] = [None] * len(levels)
    if "spectral" in loss.term_weights and have_spectra:
        spectra = [(next(remaining), next(remaining)) for _ in levels]
    elif "spectral" in loss.term_weights:
        values_XQ, ritz_vectors_XQQ = next(remaining), next(remaining)
        bases = list(itertools.islice(remaining, len(levels)))
        spectra = _level_eigenpairs(values_XQ, ritz_vectors_XQQ, bases, loss.dim)
    weights = list(remaining) if have_position_weights else [None] * len(levels)

    def level_results(
        level: int,
        student_BCHW: Tensor,
        teacher_BCHW: Tensor,
        spectrum: tuple[Tensor, Tensor] | None,
        weights_BHW: Tensor | None,
    ) -> list[Tensor]:
        if have_graphs:
            graph = TeacherGraph(teacher_BCHW, spectrum)
        else:
            graph = loss.teacher_graph(level, teacher_BCHW, spectrum)
        return _LevelTerms(loss, level, term_weights).with_gradient(
            student_BCHW, graph, weights_BHW
        )

    results = on_parallel_streams(
        functools.partial(level_results, *arguments)
        for arguments in zip(levels, students, teachers, spectra, weights, strict=True)
    )
    terms_T = torch.stack([result[0] for result in results]).mean(0)
    parameter_gradients = itertools.chain.from_iterable(result[2:] for result in results)
    return terms_T, *(result[1] for result in results), *parameter_gradients


class _LevelTerms(nn.Module):
    """The terms of one level, as a module whose parameters ``functional_call`` can replace."""

    def __init__(self, loss: LevelLoss, level: int, weights: Sequence[float]):
        super().__init__()
        self.adapter = loss.adapters[str(level)]
        self._level = level
        self._terms: Callable[..., Tensor] = loss.level_terms
        self._weights = weights
        self._levels = len(loss.student_shapes)

    def forward(self, student_BCHW: Tensor, *others: Any) -> Tensor:
        return self._terms(self._level, student_BCHW, *others, self._weights)

    def with_gradient(self, student_BCHW: Tensor, *others: Any) -> list[Tensor]:
        """Return the terms (T,), and the level's share of the gradient of maps and parameters.

        The parameters are replaced by new tensors in the same memory, because the autograd graph of
        the originals belongs to a stream other than the capture's.
        """
        student_BCHW = student_BCHW.detach().requires_grad_()
        parameters = {name: p.detach().requires_grad_() for name, p in self.named_parameters()}
        with torch.enable_grad():
            terms_T = functional_call(self, parameters, (student_BCHW, *others))
        gradient_T = filled(terms_T, self._weights) / self._levels
        gradients = torch.autograd.grad(terms_T, [student_BCHW, *parameters.values()], gradient_T)
        return [terms_T.detach(), *gradients]


def _level_eigenpairs(
    values_XQ: Tensor, ritz_vectors_XQQ: Tensor, bases: Sequence[Tensor], dim: int
) -> list[tuple[Tensor, Tensor] | None]:
    """Return eigenvalues (B, d), descending, and vectors (B, P, d) of each level."""
    pairs: list[tuple[Tensor, Tensor] | None] = []
    for number, basis_BPQ in enumerate(bases):
        batch, _, size = basis_BPQ.shape
        samples = slice(number * batch, (number + 1) * batch)
        values_Bd = values_XQ[samples, -min(dim, size) :].flip(1)
        ritz_vectors_BQd = ritz_vectors_XQQ[samples, :size, -min(dim, size) :].flip(2)
        pairs.append((values_Bd, basis_BPQ @ ritz_vectors_BQd))
    return pairs
