"""Entry point of the acceleration, called by ``raygkd.losses.GraphDistillationLoss``.

Shape letters: B batch, C channels, H height, W width, T terms.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, MutableMapping, Sequence

import torch
from torch import Tensor

from raygkd.accelerated.fast_operators import FAST
from raygkd.accelerated.parts import SumOverParts, Terms, part_size
from raygkd.accelerated.replayed import LevelLoss, ReplayedTerms, Teacher, can_be_replayed
from raygkd.graph import Operators, TeacherGraph


class AcceleratedBackend:
    """Hand-written gradients, batches processed in parts on threads, and CUDA graphs."""

    operators: Operators = FAST

    def __init__(self) -> None:
        self._replayed = ReplayedTerms()

    @property
    def held_bytes(self) -> int:
        """Return the GPU memory held between calls, in bytes."""
        return self._replayed.nbytes

    def begin(self, loss: LevelLoss, teacher: Teacher) -> None:
        """On a GPU, start the computations that need the teacher alone, on a parallel stream."""
        if can_be_replayed(loss, teacher):
            self._replayed.begin(loss, teacher)

    def replayed_terms(
        self,
        loss: LevelLoss,
        student_features: Mapping[int, Tensor],
        teacher: MutableMapping[int, Tensor] | MutableMapping[int, TeacherGraph],
        position_weights: Mapping[int, Tensor],
        weights: Sequence[float],
    ) -> Tensor | None:
        """Return the result of ``ReplayedTerms``; None if it does not support the loss."""
        if torch.is_grad_enabled() and can_be_replayed(loss, student_features):
            return self._replayed(loss, student_features, teacher, position_weights, weights)
        return None

    def over_samples(
        self,
        terms_of: Terms,
        teacher: TeacherGraph,
        weights_BHW: Tensor | None,
        term_weights: Sequence[float] | None,
        maps_BCHW: Tensor,
        *shared: Tensor,
    ) -> Tensor:
        """Return terms (T,), summed over the samples of a batch that is processed in parts.

        Args:
            terms_of: returns the summed terms of a part, given its teacher graph, its position
                weights, its maps and the shared tensors.
            teacher: the teacher's graph of the batch.
            weights_BHW: position weights, or None.
            term_weights: weights of the terms, if only the gradient of this weighted sum will be
                needed; None otherwise.
            maps_BCHW: the student's maps of the batch.
            shared: tensors passed to every part besides its maps.
        """
        size = part_size(teacher.maps_BCHW)
        graphs = list(teacher.split(size))
        weights = [None] * len(graphs) if weights_BHW is None else weights_BHW.split(size)
        parts = [
            functools.partial(terms_of, graph, position_weights)
            for graph, position_weights in zip(graphs, weights, strict=True)
        ]
        tensors = (maps_BCHW, *shared)
        if not torch.is_grad_enabled():
            tensors = tuple(tensor.detach() for tensor in tensors)
        return SumOverParts.apply(parts, size, term_weights, *tensors)
