"""Independent pieces of work on a CPU, each on a thread of its own."""

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
    """Return what a function gives of each item, as many at a time as torch has threads.

    Small operators have too little work for all threads: these wait for each other, up to 50 times
    as long as the work takes where other processes use the cores too (eigenpairs of 128 x 128). So
    each thread has items of its own, and torch one thread for each of them.

    Args:
        function: it may take gradients; grad mode and autocast are those that a new thread has.
        items: what it is called with; a single one is left to all threads.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(items) == 1:
        return [function(item) for item in items]
    with one_thread_each():
        return list(_pool(threads).map(function, items))


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Keep torch and LAPACK at one thread for each thread that calls them."""
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


# a child process has the pool, but not its threads
os.register_at_fork(after_in_child=_pool.cache_clear)
