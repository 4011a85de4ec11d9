"""Communication between the ranks of a run; every function is a no-op in a single process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


class StopVote:
    """Lets all ranks stop after the same step once any rank has been asked to stop.

    With several ranks the answer is one step old, so that no rank waits for the others.

    Args:
        is_asked_to_stop: whether this rank has been asked to stop.
        device: where the ranks exchange tensors.
    """

    def __init__(self, is_asked_to_stop: Callable[[], bool], device: torch.device):
        self._is_asked_to_stop = is_asked_to_stop
        self._device = device
        self._pending: tuple[Any, Tensor] | None = None

    def __call__(self) -> bool:
        """Return whether to stop; every rank must call this equally often."""
        if not active():
            return self._is_asked_to_stop()
        must_stop = False
        if self._pending is not None:
            work, votes = self._pending
            work.wait()
            must_stop = bool(votes.item())
        votes = torch.tensor(float(self._is_asked_to_stop()), device=self._device)
        self._pending = dist.all_reduce(votes, async_op=True), votes
        return must_stop


def active() -> bool:
    """Return whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_sum(values: Tensor) -> Tensor:
    """Return the sum of a tensor of any shape over all ranks; the argument changes in place."""
    if active():
        dist.all_reduce(values)
    return values


def gather(value: T) -> list[T]:
    """Return every rank's small object, in the order of the ranks."""
    if not active():
        return [value]
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def share_buffers(model: nn.Module) -> None:
    """Copy rank 0's buffers (batch statistics) to all ranks, so that all score the same model."""
    if active():
        with torch.no_grad():
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)
