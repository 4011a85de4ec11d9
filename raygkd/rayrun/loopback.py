"""Keep a cluster of this machine to itself: all its processes listen on 127.0.0.1 only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

ADDRESS = "127.0.0.1"


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Give a cluster that starts in the block this address, so that no other machine reaches it.

    Ray gives it to clusters where it has none of several machines, as on macOS; the address that
    ``ray.init`` takes would be replaced by one that others reach. Its processes listen on loopback
    where it is theirs.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
