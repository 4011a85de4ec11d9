"""What ``raygkd.losses.GraphDistillationLoss`` calls to be fast.

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
    """Gradients written by hand, batches in parts on threads, and CUDA graphs."""

    operators: Operators = FAST

    def __init__(self) -> None:
        self._replayed = ReplayedTerms()

    @property
    def held_bytes(self) -> int:
        """Return how much memory of a GPU is held between calls."""
        return self._replayed.nbytes

    def begin(self, loss: LevelLoss, teacher: Teacher) -> None:
        """Start on a GPU what follows from the teacher alone, beside what it does from now on."""
        if can_be_replayed(loss, teacher):
            self._replayed.begin(loss, teacher)

    def replayed_terms(
        self,
        loss: LevelLoss,
        student_features: Mapping[int, Tensor],
        teacher: MutableMapping[int, Tensor] | MutableMapping[int, TeacherGraph],
        of_positions: Mapping[int, Tensor],
        weights: Sequence[float],
    ) -> Tensor | None:
        """Return what ``ReplayedTerms`` gives; None where it cannot have the loss."""
        if torch.is_grad_enabled() and can_be_replayed(loss, student_features):
            return self._replayed(loss, student_features, teacher, of_positions, weights)
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
        """Return terms (T,), summed over the samples of a batch that is taken in parts.

        Args:
            terms_of: gives the sums of a part, of its teacher, its weights of positions, its maps,
                and what is shared.
            teacher: of the batch.
            weights_BHW: of the positions, or None.
            term_weights: of the terms, where no other sum of them will have a gradient.
            maps_BCHW: of the batch.
            shared: what every part is given besides its maps.
        """
        size = part_size(teacher.maps_BCHW)
        graphs = list(teacher.split(size))
        weights = [None] * len(graphs) if weights_BHW is None else weights_BHW.split(size)
        parts = [
            functools.partial(terms_of, graph, of_positions)
            for graph, of_positions in zip(graphs, weights, strict=True)
        ]
        tensors = (maps_BCHW, *shared)
        if not torch.is_grad_enabled():
            tensors = tuple(tensor.detach() for tensor in tensors)
        return SumOverParts.apply(parts, size, term_weights, *tensors)
