"""Functions of GPU tensors, captured as CUDA graphs.

Python takes about ten microseconds to launch a kernel, longer than a kernel on small maps runs. A
CUDA graph records the kernels once and launches all of them together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")
Function = Callable[..., tuple[Tensor, ...]]
# Each graph holds memory for its inputs and results. Beyond this number, new shapes run eagerly.
MAX_GRAPHS = 4


class Captured:
    """Functions of CUDA tensors, captured once and then replayed.

    The first call with tensors of given shapes runs eagerly, so that libraries can initialise what
    must not be initialised during a capture. The second call captures the function; later calls
    replay it. Results stay in the graph's memory and are overwritten by the next call; temporary
    memory is shared between graphs. A copy starts without graphs.
    """

    def __init__(self) -> None:
        self._graphs: dict[Hashable, _Graph | None] = {}
        self._memory: Any = None

    def __reduce__(self) -> tuple[type[Captured], tuple[()]]:
        """Copy and pickle without the graphs."""
        return Captured, ()

    def __call__(
        self, function: Function, inputs: Sequence[Tensor], key: Hashable = ()
    ) -> tuple[Tensor, ...]:
        """Return the function's results, computed without gradients and outside autocast.

        Args:
            function: must not synchronise with the GPU.
            inputs: its arguments.
            key: identifies the function and anything else it depends on, such as the addresses of
                parameters.
        """
        signature = (key, *((tensor.shape, tensor.dtype) for tensor in inputs))
        if signature in self._graphs:
            self._memory = self._memory or torch.cuda.graph_pool_handle()
            graph = self._graphs[signature] or _Graph(function, inputs, self._memory)
            self._graphs[signature] = graph
            return graph.replay(inputs)
        if len(self._graphs) < MAX_GRAPHS:
            self._graphs[signature] = None
        return _run_eagerly(function, inputs)

    @property
    def nbytes(self) -> int:
        """Return the memory held by the graphs, in bytes."""
        return sum(graph.nbytes for graph in self._graphs.values() if graph is not None)


class _Graph:
    def __init__(self, function: Function, inputs: Sequence[Tensor], memory: Any):
        # so that cached free memory is not counted as the graph's
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        self._inputs = [torch.empty_like(tensor) for tensor in inputs]
        self._graph = torch.cuda.CUDAGraph()
        # other threads may allocate during the capture, such as those that pin batches
        with torch.cuda.graph(self._graph, pool=memory, capture_error_mode="thread_local"):
            self._outputs = _run_eagerly(function, self._inputs)
        self.nbytes = torch.cuda.memory_reserved() - before

    def replay(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        torch._foreach_copy_(self._inputs, list(inputs))
        self._graph.replay()
        return self._outputs


def _run_eagerly(function: Function, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    with torch.no_grad(), torch.autocast(inputs[0].device.type, enabled=False):
        return function(*inputs)


def on_parallel_streams(tasks: Iterable[Callable[[], R]]) -> list[R]:
    """Return the results of independent tasks; during a capture, each gets a stream of its own."""
    if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return [task() for task in tasks]
    tasks, current = list(tasks), torch.cuda.current_stream()
    results = []
    for number, task in enumerate(tasks):
        stream = _stream(number, current.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            results.append(task())
    # not in the loop above, where each task would wait for the one before it
    for number in range(len(tasks)):
        current.wait_stream(_stream(number, current.device))
    return results


@functools.cache
def _stream(number: int, device: torch.device) -> torch.cuda.Stream:
    """Return a cached stream: freed memory can only be reused on the same stream."""
    return torch.cuda.Stream(device)
