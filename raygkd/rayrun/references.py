"""References to values: in the object store of the open cluster, or in this process without one.

Ray is not imported before a cluster is open.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from ray import ObjectRef


@dataclass(frozen=True, eq=False)
class Held:
    """A reference to a value in this process."""

    value: Any


Reference: TypeAlias = "ObjectRef | Held"


def is_open() -> bool:
    """Return whether this process is part of a cluster."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def put(value: Any) -> Reference:
    """Return a reference to a value."""
    if not is_open():
        return Held(value)
    import ray

    return ray.put(value)


def get(reference: Reference) -> Any:
    """Return the value of a reference."""
    if isinstance(reference, Held):
        return reference.value
    import ray

    return ray.get(reference)
