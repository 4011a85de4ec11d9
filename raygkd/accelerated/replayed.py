"""The graph losses and their gradient on a GPU: two CUDA graphs, and eigenproblems between them.

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

from raygkd.accelerated.captured import Captured, side_by_side
from raygkd.accelerated.fast_operators import FAST
from raygkd.accelerated.parts import common_ratio, filled
from raygkd.accelerated.subspace import LARGEST_COUNT, leading_subspace
from raygkd.graph import ChannelGraphs, TeacherGraph

Teacher = Mapping[int, Tensor] | Mapping[int, TeacherGraph]


class LevelLoss(Protocol):
    """What is asked of a loss over levels: ``raygkd.losses.GraphDistillationLoss`` has it all."""

    adapters: nn.ModuleDict
    term_weights: dict[str, float]
    student_shapes: dict[int, tuple[int, int, int]]
    dim: int
    mode: str
    weights: str
    training: bool

    @property
    def takes_spectra(self) -> bool:
        """Whether it takes the spectrum of each image of the teacher's."""

    def teacher_graph(
        self, level: int, teacher_BCHW: Tensor, spectrum: tuple[Tensor, Tensor] | None = None
    ) -> TeacherGraph:
        """Return what it takes of a level of the teacher."""

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
    """Return whether ``ReplayedTerms`` has a loss: on a GPU, the student not decomposed."""
    products_alone = "spectral" not in loss.term_weights or (
        loss.takes_spectra and loss.mode == "residual" and loss.dim <= LARGEST_COUNT
    )
    return products_alone and all(_maps(of_level).is_cuda for of_level in features.values())


class ReplayedTerms:
    """The terms of a graph loss, with the gradient of their weighted sum.

    The first graph takes the teacher's maps to a small matrix for each image and level; all of them
    are decomposed at once. The second takes both sides' maps to terms and gradients. A copy begins
    anew.

    Attributes:
        calls: how many there were.
    """

    def __init__(self) -> None:
        self._captured = Captured()
        self._beside: torch.cuda.Stream | None = None
        self._begun: tuple[Teacher, list[Tensor]] | None = None
        self.calls = 0

    def __reduce__(self) -> tuple[type[ReplayedTerms], tuple[()]]:
        """Copies and pickles have no graphs."""
        return ReplayedTerms, ()

    @property
    def nbytes(self) -> int:
        """Return how much memory the graphs hold between calls."""
        return self._captured.nbytes

    def begin(self, loss: LevelLoss, teacher: Teacher) -> None:
        """Start what follows from the teacher alone, beside what the GPU does from now on."""
        self._begun = None
        graphs = [one for one in teacher.values() if isinstance(one, TeacherGraph)]
        are_known = any(graph.spectrum is not None for graph in graphs)
        if are_known or "spectral" not in loss.term_weights:
            return
        function = functools.partial(subspaces, loss, bool(graphs))
        maps = [_maps(teacher[level]) for level in loss.student_shapes]
        with torch.cuda.stream(self._stream_behind(maps[0])):
            found = self._captured(function, maps, also=("subspaces", bool(graphs)))
        self._begun = teacher, list(found)

    def _stream_behind(self, maps: Tensor) -> torch.cuda.Stream | None:
        """Return the stream beside the current one, which goes on behind it; None on a CPU."""
        if not maps.is_cuda:
            return None
        self._beside = self._beside or torch.cuda.Stream(maps.device)
        self._beside.wait_stream(torch.cuda.current_stream(maps.device))
        return self._beside

    def __call__(
        self,
        loss: LevelLoss,
        student_features: Mapping[int, Tensor],
        teacher: MutableMapping[int, Tensor] | MutableMapping[int, TeacherGraph],
        of_positions: Mapping[int, Tensor],
        weights: Sequence[float],
    ) -> Tensor:
        """Return the terms (T,), averaged over levels and samples.

        Args:
            loss: what is worked out.
            student_features: level -> feature maps (B, C_s, H_s, W_s).
            teacher: level -> feature maps (B, C_t, H_t, W_t), or its graph; they are taken out.
            of_positions: level -> weights of the positions, or nothing.
            weights: of the terms in the sum whose gradient is taken.
        """
        if self._begun is None or self._begun[0] is not teacher:
            self.begin(loss, teacher)
        pairs = self._found_pairs()
        taken = [teacher.pop(level) for level in loss.student_shapes]
        known = [one.spectrum for one in taken if isinstance(one, TeacherGraph) and one.spectrum]
        if known and "spectral" in loss.term_weights:
            pairs = [part[..., : loss.dim] for spectrum in known for part in spectrum]
        form = (isinstance(taken[0], TeacherGraph), bool(known), bool(of_positions))
        given = [*map(_maps, taken), *pairs, *of_positions.values()]
        students = [student_features[level] for level in loss.student_shapes]
        function = functools.partial(terms_and_gradients, loss, weights, *form)
        parameters = list(loss.adapters.parameters())
        held = [*parameters, *loss.adapters.buffers()]
        addresses = (tensor.data_ptr() for tensor in held)
        also = ("terms", *form, *weights, loss.training, *addresses)

        def run(*students: Tensor) -> tuple[Tensor, ...]:
            return self._captured(function, [*students, *given], also)

        self.calls += 1
        return _Replay.apply(self, run, weights, len(students), *students, *parameters)

    def _found_pairs(self) -> list[Tensor]:
        """Return eigenvalues and vectors of the small matrices, and the bases; waits for these."""
        if self._begun is None:
            return []
        *bases, matrices_XQQ = self._begun[1]
        self._begun = None
        with torch.cuda.stream(self._beside):
            pairs = torch.linalg.eigh(matrices_XQQ)
        if self._beside is not None:
            torch.cuda.current_stream().wait_stream(self._beside)
        return [*pairs, *bases]


class _Replay(torch.autograd.Function):
    """Terms whose gradient is there already, in memory that the next call overwrites."""

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
            replayed: whose call it is.
            run: of the student's maps -> terms, and the gradient of their weighted sum in all
                inputs.
            weights: of the terms.
            count: how many of the inputs are maps.
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
            RuntimeError: the terms of another batch were worked out since.
        """
        if ctx.replayed.calls != ctx.call:
            raise RuntimeError("the gradient of a batch must be requested before the next batch")
        ratio = common_ratio(grad_T, ctx.weights)
        return None, None, None, None, *(gradient * ratio for gradient in ctx.gradients)


def _maps(teacher: Tensor | TeacherGraph) -> Tensor:
    return teacher.maps_BCHW if isinstance(teacher, TeacherGraph) else teacher


def subspaces(loss: LevelLoss, are_graphs: bool, *maps: Tensor) -> tuple[Tensor, ...]:
    """Return ``leading_subspace`` of the teacher's graphs.

    Args:
        loss: whose levels they are.
        are_graphs: whether the maps are those of ``TeacherGraph``.
        maps: of each level.

    Returns:
        a basis (B, P, Q) for each level, and all small matrices (X, Q, Q), with as many rows and
        columns each as the largest.
    """

    def of_level(level: int, maps_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        if not are_graphs:
            maps_BCHW = loss.teacher_graph(level, maps_BCHW).maps_BCHW
        return leading_subspace(ChannelGraphs(maps_BCHW, loss.weights, FAST).smaller_matrix())

    found = side_by_side(
        functools.partial(of_level, *pair) for pair in zip(loss.student_shapes, maps, strict=True)
    )
    side = max(ritz_BQQ.shape[1] for _, ritz_BQQ in found)
    matrices = torch.cat([_grown(ritz_BQQ, side) for _, ritz_BQQ in found])
    return *(basis_BPQ for basis_BPQ, _ in found), matrices


def _grown(matrix_BQQ: Tensor, side: int) -> Tensor:
    """Return matrices with more rows and columns, whose eigenvalues are the lowest of all."""
    batch, own = matrix_BQQ.shape[:2]
    grown = matrix_BQQ.new_zeros(batch, side, side)
    grown[:, :own, :own] = matrix_BQQ
    grown.diagonal(dim1=1, dim2=2)[:, own:] = -1.0
    return grown


def terms_and_gradients(
    loss: LevelLoss,
    term_weights: Sequence[float],
    are_graphs: bool,
    are_known: bool,
    are_weighted: bool,
    *given: Tensor,
) -> tuple[Tensor, ...]:
    """Return the terms of a loss (T,), and the gradient of their weighted sum.

    Args:
        loss: what is worked out.
        term_weights: of the terms in the sum.
        are_graphs: whether the teacher's maps are those of ``TeacherGraph``.
        are_known: whether eigenpairs are those of ``TeacherGraph``.
        are_weighted: whether there are weights of the positions.
        given: the student's maps of each level; the teacher's; eigenvalues and vectors of each
            level where they are known, or else those of what ``subspaces`` gives, and its bases;
            weights of the positions of each level.

    Returns:
        the terms, and gradients of the student's maps and of the adapters' parameters.
    """
    levels, rest = list(loss.student_shapes), iter(given)
    students = list(itertools.islice(rest, len(levels)))
    teachers = list(itertools.islice(rest, len(levels)))
    spectra: list[tuple[Tensor, Tensor] | None] = [None] * len(levels)
    if "spectral" in loss.term_weights and are_known:
        spectra = [(next(rest), next(rest)) for _ in levels]
    elif "spectral" in loss.term_weights:
        values_XQ, rotations_XQQ = next(rest), next(rest)
        bases = list(itertools.islice(rest, len(levels)))
        spectra = _turned(values_XQ, rotations_XQQ, bases, loss.dim)
    weights = list(rest) if are_weighted else [None] * len(levels)

    def of_level(
        level: int,
        student_BCHW: Tensor,
        teacher_BCHW: Tensor,
        spectrum: tuple[Tensor, Tensor] | None,
        weights_BHW: Tensor | None,
    ) -> list[Tensor]:
        if are_graphs:
            graph = TeacherGraph(teacher_BCHW, spectrum)
        else:
            graph = loss.teacher_graph(level, teacher_BCHW, spectrum)
        return _LevelTerms(loss, level, term_weights).with_gradient(
            student_BCHW, graph, weights_BHW
        )

    found = side_by_side(
        functools.partial(of_level, *of_one)
        for of_one in zip(levels, students, teachers, spectra, weights, strict=True)
    )
    terms_T = torch.stack([of_one[0] for of_one in found]).mean(0)
    of_parameters = itertools.chain.from_iterable(of_one[2:] for of_one in found)
    return terms_T, *(of_one[1] for of_one in found), *of_parameters


class _LevelTerms(nn.Module):
    """The terms of one level, with the adapter that ``functional_call`` may give other tensors."""

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
        """Return the terms (T,), and the level's share of the gradient in maps and parameters.

        The parameters are others in the same memory: those that training has a graph of belong to
        another stream than a capture's.
        """
        student_BCHW = student_BCHW.detach().requires_grad_()
        own = {name: part.detach().requires_grad_() for name, part in self.named_parameters()}
        with torch.enable_grad():
            terms_T = functional_call(self, own, (student_BCHW, *others))
        gradient_T = filled(terms_T, self._weights) / self._levels
        gradients = torch.autograd.grad(terms_T, [student_BCHW, *own.values()], gradient_T)
        return [terms_T.detach(), *gradients]


def _turned(
    values_XQ: Tensor, rotations_XQQ: Tensor, bases: Sequence[Tensor], dim: int
) -> list[tuple[Tensor, Tensor] | None]:
    """Return eigenvalues (B, d), descending, and vectors (B, P, d) of each level."""
    pairs: list[tuple[Tensor, Tensor] | None] = []
    for number, basis_BPQ in enumerate(bases):
        batch, _, own = basis_BPQ.shape
        place = slice(number * batch, (number + 1) * batch)
        values_Bd = values_XQ[place, -min(dim, own) :].flip(1)
        rotations_BQd = rotations_XQQ[place, :own, -min(dim, own) :].flip(2)
        pairs.append((values_Bd, basis_BPQ @ rotations_BQd))
    return pairs
