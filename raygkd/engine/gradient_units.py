"""Weights of loss terms as shares of the labels' gradient.

With a weight of 1, a term has as large a gradient as the labels, whatever the networks, the layer
and the form of the loss.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

# steps whose gradients are averaged before the weights are fixed
STEPS = 10
# norm used for the labels' gradient if there are no labels: about that of the cross-entropy of a
# newly initialised network
WITHOUT_LABELS = 1.0


class GradientUnits:
    """Converts shares of the labels' gradient into factors of the terms.

    The norms of the terms' gradients with respect to the student's parameters are averaged over the
    first ``STEPS`` steps and then fixed. Until then, the factors follow the norms measured so far.
    Every rank must add the same norms.

    Args:
        terms: names of the terms whose weights are shares.

    Source: [ours]; GradNorm, arXiv 1711.02257, balances terms by the norms of their gradients, but
    keeps adjusting them.
    """

    def __init__(self, terms: Collection[str]):
        self.terms = tuple(terms)
        self._sums: dict[str, float] = {}
        self._steps = 0

    @property
    def is_measuring(self) -> bool:
        """Whether the norms of the next step are needed."""
        return self._steps < STEPS

    def add(self, norms: Mapping[str, float]) -> None:
        """Add the norms of a step.

        Args:
            norms: unweighted term -> norm of its gradient, including "task" if there is one.
        """
        for name, norm in norms.items():
            self._sums[name] = self._sums.get(name, 0.0) + norm
        self._steps += 1

    def factor(self, name: str, weight: float) -> float:
        """Return the factor of a term in the total; for other terms, the weight itself.

        Args:
            name: name of the term.
            weight: its share of the labels' gradient.

        Raises:
            RuntimeError: no norms were added yet.
        """
        if name not in self.terms:
            return weight
        if not self._steps:
            raise RuntimeError("weights are shares of gradients that have not been measured yet")
        # a detector's first batches may have no boxes, and hence no gradient
        labels = self._sums.get("task") or self._steps * WITHOUT_LABELS
        norm = self._sums[name]
        return weight * labels / norm if norm else weight

    def state_dict(self) -> dict[str, Any]:
        """Return the measurements."""
        return {"sums": dict(self._sums), "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state_dict`` returned."""
        self._sums, self._steps = dict(state["sums"]), state["steps"]
