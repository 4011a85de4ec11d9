"""Random streams that depend on their seed and key alone, the same on every machine."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np


def generator(seed: int, *key: int) -> np.random.Generator:
    """Return the generator of a seed and a key; different keys give independent generators."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


def row_random(seed: int, epoch: int, row: int) -> random.Random:
    """Return the random stream of one image in one epoch.

    Use its method ``random()`` only: Python guarantees the same numbers in all versions for no
    other. A NumPy generator would take twice as long to create.
    """
    words = b"".join(word.to_bytes(16, "little") for word in (seed, epoch, row))
    return random.Random(int.from_bytes(hashlib.blake2b(words, digest_size=16).digest(), "little"))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generator of the CPU, which torchvision draws from; put it back afterwards."""
    # the names of data sets are known without it
    import torch

    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed the GPUs as well
        torch.default_generator.manual_seed(seed)
        yield
