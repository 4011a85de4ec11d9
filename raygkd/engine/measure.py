"""How long work takes beside other work, and how much memory it needs.

Seconds are compared in one process and in turns, so that what else the machine does slows all sides
alike: a ratio is worth more than the seconds it is made of.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raygkd.engine.loop import Training

Function = Callable[[], Any]
# the second captures CUDA graphs
CALLS_BEFORE = 2
# bytes of a MiB
MIB = float(1 << 20)


@dataclass(frozen=True)
class Timings:
    """Seconds of several functions that took turns.

    Attributes:
        seconds: name -> seconds of one call, in each round.
    """

    seconds: Mapping[str, Sequence[float]]

    @property
    def medians(self) -> dict[str, float]:
        """Return name -> median of the seconds of a call."""
        return {name: statistics.median(rounds) for name, rounds in self.seconds.items()}

    def ratios(self, name: str, to: str) -> list[float]:
        """Return how many times the seconds of ``to`` a call of ``name`` took, in each round."""
        return [a / b for a, b in zip(self.seconds[name], self.seconds[to], strict=True)]

    def ratio(self, name: str, to: str) -> float:
        """Return the median of ``ratios``: both sides of a round met the same machine."""
        return statistics.median(self.ratios(name, to))


def interleaved(
    functions: Mapping[str, Function],
    repeats: int,
    *,
    warmup: int = 1,
    least_seconds: float = 0.0,
) -> Timings:
    """Time functions in rounds that call each of them, every other round in the opposite order.

    A function is called as often in a round as its ``least_seconds`` need, and counted by the call.
    Work that it leaves to the current CUDA device is waited for.

    Args:
        functions: name -> what is timed; it may change what it works on, as a training step does.
        repeats: rounds that count.
        warmup: rounds before them that do not; one or more.
        least_seconds: that a function runs in a round; 0 for one call.
    """
    calls = dict.fromkeys(functions, 1)
    for _ in range(max(1, warmup)):
        for name, function in functions.items():
            once = _seconds(function, 1)
            calls[name] = max(1, round(least_seconds / once)) if once > 0 else 1
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for turn in range(repeats):
        for name in names if turn % 2 == 0 else reversed(names):
            seconds[name].append(_seconds(functions[name], calls[name]) / calls[name])
    return Timings(seconds)


def _seconds(function: Function, calls: int) -> float:
    _wait()
    started = time.perf_counter()
    for _ in range(calls):
        function()
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_bytes(function: Function, device: torch.device) -> int:
    """Return by how many bytes the tensors alive grow while a function runs, at their most.

    It is called before and the last call counts, so that what it keeps from call to call (the
    gradients of a training step, CUDA graphs) is there, and what of it is freed meanwhile is
    subtracted. On a GPU that is ``torch.cuda.max_memory_allocated`` above what was allocated
    before. On a CPU it is the bytes of the storages that operators return, from then until they are
    freed; what an operator allocates for itself and frees before it returns is not counted.

    Args:
        function: what is measured; it may change what it works on.
        device: where its tensors are.
    """
    if device.type == "cuda":
        for _ in range(CALLS_BEFORE):
            function()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveBytes() as live:
        function()
        before = live.peak = live.now
        function()
    return live.peak - before


def state_bytes(training: Training) -> int:
    """Return the bytes that a run holds between its steps.

    Parameters, gradients and buffers of student, adapters and teacher, the optimiser's state, and
    what the graph losses hold on a GPU. With ``peak_bytes`` of its step it is the memory that the
    run needs on its device.
    """
    modules: list[nn.Module] = [training.objective]
    modules += [training.teacher.model] if training.teacher is not None else []
    parameters = [parameter for module in modules for parameter in module.parameters()]
    tensors: list[Any] = [
        *parameters,
        *(parameter.grad for parameter in parameters),
        *(buffer for module in modules for buffer in module.buffers()),
        *tree_leaves(list(training.optimizer.state.values())),
    ]
    graph = training.objective.graph
    return sum(_storages(tensors).values()) + (0 if graph is None else graph.held_bytes)


def _storages(values: Iterable[Any]) -> dict[int, int]:
    """Return the storages of those values that are tensors, each once, with their bytes."""
    storages = [value.untyped_storage() for value in values if isinstance(value, Tensor)]
    return {storage._cdata: storage.nbytes() for storage in storages}


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages made while it is on, as long as they are alive.

    Attributes:
        now: bytes at the moment.
        peak: most bytes since it was last set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator and note the storages that it returns and was not given."""
        kwargs = kwargs or {}
        given = _storages(tree_leaves((args, kwargs)))
        result = func(*args, **kwargs)
        for value in tree_leaves(result):
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._alive:
                self._alive[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, storage: int) -> None:
        self.now -= self._alive.pop(storage)
