"""Means over the steps of an epoch and over all ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from raygkd.engine.distributed import all_sum


class RunningMeans:
    """Sums named scalars step by step, in float64 on their device, without synchronising.

    Args:
        device: device of the scalars.
    """

    def __init__(self, device: torch.device):
        self._steps = torch.zeros((), dtype=torch.float64, device=device)
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add the scalars of a step; every step has the same names."""
        self._steps += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.double()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums of this rank so far."""
        return {"steps": self._steps, **{f"sum_{name}": s for name, s in self._sums.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the result of ``state_dict``."""
        sums = {name: value.to(self._steps.device) for name, value in state.items()}
        self._steps = sums.pop("steps")
        self._sums = {name.removeprefix("sum_"): value for name, value in sums.items()}

    def compute(self) -> dict[str, float]:
        """Return name -> mean over steps and ranks; every rank must call, after a step or more."""
        steps, *sums = all_sum(torch.stack([self._steps, *self._sums.values()])).tolist()
        return {name: total / steps for name, total in zip(self._sums, sums, strict=True)}
