"""Independent tasks on a CPU, each on a thread of its own."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def each_on_a_thread(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Return a function's result for each item, with as many items at a time as torch has threads.

    Small tensor operations cannot keep all threads busy. Waiting for each other can take the
    threads 50 times as long as the work itself when other processes use the cores too (eigenpairs
    of 128 x 128 matrices). Here, each item runs on one thread, with torch limited to that thread.

    Args:
        function: may compute gradients; grad mode and autocast are those of a new thread.
        items: its arguments; a single item uses all threads.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(items) == 1:
        return [function(item) for item in items]
    with one_thread_each():
        return list(_pool(threads).map(function, items))


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Limit torch and LAPACK to one thread for each calling thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(
        threads, thread_name_prefix="raygkd", initializer=torch.set_num_threads, initargs=(1,)
    )


# a forked process inherits the pool, but not its threads
os.register_at_fork(after_in_child=_pool.cache_clear)
