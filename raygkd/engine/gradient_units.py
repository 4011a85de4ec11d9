"""Weights of loss terms as shares of the labels' gradient.

A weight of 1 then moves the student as much as its labels do, whatever the pair of networks, the
layer and the form of the loss.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

# steps whose gradients are averaged before the weights are fixed
STEPS = 10
# the norm that stands for the labels' gradient where there are no labels: cross-entropy of a
# network that has just been initialised has about this one
WITHOUT_LABELS = 1.0


class GradientUnits:
    """Turns shares of the labels' gradient into factors of the terms.

    The norms of the terms' gradients in the student's parameters are averaged over the first
    ``STEPS`` steps, and stay as they are from then on. Until then the factors follow what has been
    measured so far. Every rank must add the same norms.

    Args:
        terms: names of the terms whose weights are shares.

    Source: [ours]; that terms are balanced by the norms of their gradients is GradNorm's, arXiv
    1711.02257, which goes on changing them.
    """

    def __init__(self, terms: Collection[str]):
        self.terms = tuple(terms)
        self._sums: dict[str, float] = {}
        self._steps = 0

    @property
    def is_measuring(self) -> bool:
        """Whether the norms of the next step are wanted."""
        return self._steps < STEPS

    def add(self, norms: Mapping[str, float]) -> None:
        """Take the norms of a step: term -> norm of its gradient, "task" among them if it has one.

        Args:
            norms: of the unweighted terms.
        """
        for name, norm in norms.items():
            self._sums[name] = self._sums.get(name, 0.0) + norm
        self._steps += 1

    def factor(self, name: str, weight: float) -> float:
        """Return what a term is multiplied by for a weight; the weight itself of any other term.

        Args:
            name: of the term.
            weight: its share of the labels' gradient.

        Raises:
            RuntimeError: no norms were added yet.
        """
        if name not in self.terms:
            return weight
        if not self._steps:
            raise RuntimeError("weights are shares of gradients that nobody has measured yet")
        # a detector's first batches may have no boxes, and so nothing to move it by
        labels = self._sums.get("task") or self._steps * WITHOUT_LABELS
        own = self._sums[name]
        return weight * labels / own if own else weight

    def state_dict(self) -> dict[str, Any]:
        """Return what has been measured."""
        return {"sums": dict(self._sums), "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state_dict`` returned."""
        self._sums, self._steps = dict(state["sums"]), state["steps"]
