"""The contents of a data set that is not prepared: statistics from its files' metadata."""

from __future__ import annotations

import os
from typing import Any

from raygkd.data.audit import audit, class_counts
from raygkd.data.boxes import Boxes
from raygkd.data.inspect import box_facts, headers, spread
from raygkd.data.seeds import generator
from raygkd.data.sources import Sample, Source
from raygkd.data.splits import NO_LABEL, SPLITS

SAMPLE = 256


def source_info(source: Source, path: str, *, sample: int = SAMPLE) -> dict[str, Any]:
    """Return what ``table_info`` returns, without decoding images.

    Only a sample of the images is read, and those whose size is that of one in another split.

    Args:
        source: the data set.
        path: where it is.
        sample: maximum number of images whose headers are read; the sample is fixed.
    """
    order = generator(0).permutation(len(source.samples))[:sample]
    sizes, formats, bad = headers([_content(source.samples[index]) for index in sorted(order)])
    files = {one.origin for one in source.samples if os.path.isfile(one.origin)}
    info = {
        "path": path,
        "dataset": source.name,
        "images": len(source.samples),
        "files": len(files),
        "bytes": sum(map(os.path.getsize, files)),
        "splits": {split: sum(s.split == split for s in source.samples) for split in SPLITS},
        "classes": _classes(source),
        "unlabelled": sum(s.label == NO_LABEL for s in source.samples),
        "sampled": len(order),
        "width": spread([width for width, _ in sizes]),
        "height": spread([height for _, height in sizes]),
        "uniform_size": len(set(sizes)) == 1,
        "formats": dict(formats.most_common()),
        "bad": bad,
        "warnings": [*source.warnings, *audit(source)],
    }
    if source.task == "classification":
        return info
    boxes = Boxes.of([one.boxes for one in source.samples if one.boxes is not None])
    return info | box_facts(source.class_names, boxes)


def _classes(source: Source) -> dict[str, dict[str, int]]:
    counts = class_counts(source)
    return {
        name: {split: counts[split][label] if split in counts else 0 for split in SPLITS}
        for label, name in enumerate(source.class_names)
    }


def _content(sample: Sample) -> bytes:
    """Return the encoded image; empty if it cannot be read."""
    try:
        return sample.read()
    except OSError:
        return b""
