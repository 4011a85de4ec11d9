"""Measures how long functions take, relative to each other, and how much memory they need.

Functions are timed in turns in one process, so that other load on the machine slows all of them
equally: ratios are more reliable than the times themselves.
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
# the second call captures CUDA graphs
WARMUP_CALLS = 2
# bytes in a MiB
MIB = float(1 << 20)


@dataclass(frozen=True)
class Timings:
    """Times of several functions that took turns.

    Attributes:
        seconds: name -> seconds per call in each round.
    """

    seconds: Mapping[str, Sequence[float]]

    @property
    def medians(self) -> dict[str, float]:
        """Return name -> median of the seconds per call."""
        return {name: statistics.median(rounds) for name, rounds in self.seconds.items()}

    def ratios(self, name: str, to: str) -> list[float]:
        """Return the time of ``name`` relative to that of ``to``, in each round."""
        return [a / b for a, b in zip(self.seconds[name], self.seconds[to], strict=True)]

    def ratio(self, name: str, to: str) -> float:
        """Return the median of ``ratios``."""
        return statistics.median(self.ratios(name, to))


def interleaved(
    functions: Mapping[str, Function],
    repeats: int,
    *,
    warmup: int = 1,
    min_seconds: float = 0.0,
) -> Timings:
    """Time functions in rounds that call each of them, every other round in reverse order.

    In a round, a function is called repeatedly for about ``min_seconds``, and the time per call is
    recorded. Pending work on the current CUDA device is waited for.

    Args:
        functions: name -> function to time; it may change state, as a training step does.
        repeats: number of measured rounds.
        warmup: number of rounds before them that are not measured; at least 1.
        min_seconds: minimum time of a function in a round; 0 for one call.
    """
    calls = dict.fromkeys(functions, 1)
    for _ in range(max(1, warmup)):
        for name, function in functions.items():
            seconds_per_call = _seconds(function, 1)
            repeated = round(min_seconds / seconds_per_call) if seconds_per_call > 0 else 1
            calls[name] = max(1, repeated)
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
    """Return the peak of additional memory, in bytes, that a function's tensors take.

    The function is called once or twice before the measured call, so that memory it keeps between
    calls (the gradients of a training step, CUDA graphs) already exists. On a GPU, the result is
    ``torch.cuda.max_memory_allocated`` minus the memory allocated before. On a CPU, it counts the
    storages that operators return until they are freed; memory that an operator frees before it
    returns is not counted.

    Args:
        function: function to measure; it may change state.
        device: where its tensors are.
    """
    if device.type == "cuda":
        for _ in range(WARMUP_CALLS):
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

    They are the parameters, gradients and buffers of student, adapters and teacher, the optimiser's
    state, and the GPU memory held by the graph losses. Together with ``peak_bytes`` of a step, they
    are the memory that the run needs on its device.
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
    """Return storage -> bytes of those values that are tensors, each storage once."""
    storages = [value.untyped_storage() for value in values if isinstance(value, Tensor)]
    return {storage._cdata: storage.nbytes() for storage in storages}


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of live storages that were created while the mode is active.

    Attributes:
        now: current bytes.
        peak: maximum of ``now`` since it was last set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator and record the new storages that it returns."""
        kwargs = kwargs or {}
        input_storages = _storages(tree_leaves((args, kwargs)))
        result = func(*args, **kwargs)
        for value in tree_leaves(result):
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            if storage._cdata not in input_storages and storage._cdata not in self._alive:
                self._alive[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, storage: int) -> None:
        self.now -= self._alive.pop(storage)
