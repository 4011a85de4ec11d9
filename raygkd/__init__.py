"""Distil large vision models into small ones by matching graphs of their feature channels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raygkd.api import Matching, distill

__version__ = "0.1.0"
__all__ = ["Matching", "__version__", "distill"]


def __getattr__(name: str) -> Any:
    """Import names that need torch on first access."""
    if name not in ("Matching", "distill"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from raygkd import api

    return getattr(api, name)
