"""Random streams that are functions of what they are for, equal on every machine."""

from __future__ import annotations

import hashlib
import random

import numpy as np


def generator(seed: int, *key: int) -> np.random.Generator:
    """Return the generator of a seed and a key; keys of other values or lengths are independent."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


def row_random(seed: int, epoch: int, row: int) -> random.Random:
    """Return the random stream of one image in one epoch.

    Only ``random()`` of it is to be used: that method alone is promised to give the same numbers
    in every version of Python. A NumPy generator takes twice as long to set up.
    """
    words = b"".join(word.to_bytes(16, "little") for word in (seed, epoch, row))
    return random.Random(int.from_bytes(hashlib.blake2b(words, digest_size=16).digest(), "little"))
