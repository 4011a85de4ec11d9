"""Distil large vision models into small ones by matching graphs of their feature channels."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from raygkd.version import __version__

if TYPE_CHECKING:
    from raygkd.api import Matching, distill
    from raygkd.commands import Run, compare, train, tune
    from raygkd.data.images import Images

__all__ = ["Images", "Matching", "Run", "__version__", "compare", "distill", "train", "tune"]

# public name -> the module that has it, which is imported on first access
_HOMES = {
    **dict.fromkeys(("Matching", "distill"), "raygkd.api"),
    **dict.fromkeys(("Run", "compare", "train", "tune"), "raygkd.commands"),
    "Images": "raygkd.data.images",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first access."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
