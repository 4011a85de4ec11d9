"""Functions of tensors on a GPU as CUDA graphs.

Python needs some ten microseconds to launch a kernel, and a kernel on small maps takes less. A
graph has its kernels recorded once and launches all of them at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")
Function = Callable[..., tuple[Tensor, ...]]
# each graph has memory of its own inputs and results; batches of ever new shapes are taken as they
# come
MOST_KINDS = 4


class Captured:
    """Functions that are called with CUDA tensors, one after the other, and replayed.

    The first call with tensors of some shapes runs the function as it is, so that libraries have
    prepared what a capture must not; the second captures it, and from then on it is replayed. What
    is returned lies in memory of the graph, and the next call overwrites it; all else is in memory
    that the graphs share. A copy begins anew.
    """

    def __init__(self) -> None:
        self._graphs: dict[Hashable, _Graph | None] = {}
        self._memory: Any = None

    def __reduce__(self) -> tuple[type[Captured], tuple[()]]:
        """Copies and pickles have no graphs."""
        return Captured, ()

    def __call__(
        self, function: Function, inputs: Sequence[Tensor], also: Hashable = ()
    ) -> tuple[Tensor, ...]:
        """Return what the function gives, without gradient and outside autocast.

        Args:
            function: it must not ask the GPU for a number.
            inputs: what it is called with.
            also: which function it is, and what else it depends on, as the addresses of parameters.
        """
        kind = (also, *((tensor.shape, tensor.dtype) for tensor in inputs))
        if kind in self._graphs:
            self._memory = self._memory or torch.cuda.graph_pool_handle()
            graph = self._graphs[kind] or _Graph(function, inputs, self._memory)
            self._graphs[kind] = graph
            return graph.replay(inputs)
        if len(self._graphs) < MOST_KINDS:
            self._graphs[kind] = None
        return _plain(function, inputs)

    @property
    def nbytes(self) -> int:
        """Return how much memory the graphs hold."""
        return sum(graph.nbytes for graph in self._graphs.values() if graph is not None)


class _Graph:
    def __init__(self, function: Function, inputs: Sequence[Tensor], memory: Any):
        # what is free is no part of the graph's memory
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        self._inputs = [torch.empty_like(tensor) for tensor in inputs]
        self._graph = torch.cuda.CUDAGraph()
        # other threads may allocate meanwhile, as those do that pin batches
        with torch.cuda.graph(self._graph, pool=memory, capture_error_mode="thread_local"):
            self._outputs = _plain(function, self._inputs)
        self.nbytes = torch.cuda.memory_reserved() - before

    def replay(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        torch._foreach_copy_(self._inputs, list(inputs))
        self._graph.replay()
        return self._outputs


def _plain(function: Function, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    with torch.no_grad(), torch.autocast(inputs[0].device.type, enabled=False):
        return function(*inputs)


def side_by_side(works: Iterable[Callable[[], R]]) -> list[R]:
    """Return what pieces of work give; in a graph that is captured none waits for another."""
    if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return [work() for work in works]
    works, current = list(works), torch.cuda.current_stream()
    results = []
    for number, work in enumerate(works):
        stream = _stream(number, current.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            results.append(work())
    # only now, or each would begin behind the one before
    for number in range(len(works)):
        current.wait_stream(_stream(number, current.device))
    return results


@functools.cache
def _stream(number: int, device: torch.device) -> torch.cuda.Stream:
    """Return the same stream every time: free memory belongs to the stream that it was used on."""
    return torch.cuda.Stream(device)
