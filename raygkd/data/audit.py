"""Doubtful classes and images of a data set: too few images, and images in several splits."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence

import numpy as np

from raygkd.data.faults import Fault, Faults
from raygkd.data.sources import Sample, Source
from raygkd.data.splits import SPLITS


def audit(source: Source, *, strict: bool = False) -> tuple[str, ...]:
    """Return a line per kind of doubtful class or image.

    Images are compared by their bytes: those of equal size that are in several splits are read.
    Images that are generated, and neither files nor parts of files, are not compared.

    Raises:
        DataError: there are some, and ``strict`` is set.
    """
    faults = Faults(strict)
    _report_classes(source, faults)
    if len({sample.split for sample in source.samples}) > 1:
        _report_leaks(source, faults)
    return faults.warnings()


def class_counts(source: Source) -> dict[str, Counter[int]]:
    """Return split -> class -> images with it, for the splits that have images."""
    counts: dict[str, Counter[int]] = {}
    for sample in source.samples:
        labels = [sample.label] if sample.boxes is None else np.unique(sample.boxes.label).tolist()
        counts.setdefault(sample.split, Counter()).update(labels)
    return {split: counts[split] for split in SPLITS if split in counts}


def _report_classes(source: Source, faults: Faults) -> None:
    counts = class_counts(source)
    for label, name in enumerate(source.class_names):
        if sum(part[label] for part in counts.values()) == 1:
            faults.add(Fault.SMALL_CLASS, source.name, repr(name))
        for split, part in counts.items():
            if not part[label]:
                faults.add(Fault.UNSEEN_CLASS, source.name, repr(name), of=split)


def _report_leaks(source: Source, faults: Faults) -> None:
    by_size: dict[int, list[Sample]] = {}
    for sample in source.samples:
        if os.path.isfile(sample.origin):
            by_size.setdefault(os.path.getsize(sample.origin), []).append(sample)
        elif source.version:
            by_size.setdefault(len(sample.read()), []).append(sample)
    for samples in by_size.values():
        if len({sample.split for sample in samples}) > 1:
            _report_equal(samples, faults)


def _report_equal(samples: Sequence[Sample], faults: Faults) -> None:
    """Report the images that are equal to one of another split."""
    seen: dict[bytes, Sample] = {}
    for sample in samples:
        try:
            digest = hashlib.sha256(sample.read()).digest()
        except OSError:  # reported when it is decoded
            continue
        first = seen.setdefault(digest, sample)
        if first.split != sample.split:
            faults.add(Fault.LEAKED, sample.origin, first.origin)
