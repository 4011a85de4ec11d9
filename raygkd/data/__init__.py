"""Data sets, samples and transforms: which rows are read, in which order, and how they change.

To open and write Parquet files, import ``raygkd.data.parquet`` and ``raygkd.data.prepare``, which
need pyarrow. Names are imported on first access: settings take defaults from the classes of data
sets, which need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raygkd.data.boxes import Boxes, ImageBoxes
    from raygkd.data.decoding import decode
    from raygkd.data.inspect import sample_sheet, table_info
    from raygkd.data.loader import PlainStream, rebatch
    from raygkd.data.normalisation import channel_statistics
    from raygkd.data.plan import cut_windows, epoch_windows, evaluation_rows, steps_per_epoch
    from raygkd.data.sources import Sample, Source, open_source
    from raygkd.data.splits import SPLITS, Splits, split_rows
    from raygkd.data.transforms import KINDS, Transform, build_transform, default_augment
    from raygkd.data.windows import Window, decode_rows, load_window, transform_window

__all__ = [
    "KINDS",
    "SPLITS",
    "Boxes",
    "ImageBoxes",
    "PlainStream",
    "Sample",
    "Source",
    "Splits",
    "Transform",
    "Window",
    "build_transform",
    "channel_statistics",
    "cut_windows",
    "decode",
    "decode_rows",
    "default_augment",
    "epoch_windows",
    "evaluation_rows",
    "load_window",
    "open_source",
    "rebatch",
    "sample_sheet",
    "split_rows",
    "steps_per_epoch",
    "table_info",
    "transform_window",
]

# module -> the names that it has
_MODULES = {
    "boxes": ("Boxes", "ImageBoxes"),
    "decoding": ("decode",),
    "inspect": ("sample_sheet", "table_info"),
    "loader": ("PlainStream", "rebatch"),
    "normalisation": ("channel_statistics",),
    "plan": ("cut_windows", "epoch_windows", "evaluation_rows", "steps_per_epoch"),
    "sources": ("Sample", "Source", "open_source"),
    "splits": ("SPLITS", "Splits", "split_rows"),
    "transforms": ("KINDS", "Transform", "build_transform", "default_augment"),
    "windows": ("Window", "decode_rows", "load_window", "transform_window"),
}


def __getattr__(name: str) -> Any:
    """Import a name from its module."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
