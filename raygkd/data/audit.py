"""Doubtful classes and images of a data set: too few images, and copies of an image."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from raygkd.data.faults import Fault, Faults
from raygkd.data.sources import Sample, Source
from raygkd.data.splits import SPLITS

# read of each file whose size another has
BLOCK_BYTES = 4096


def audit(source: Source, *, strict: bool = False) -> tuple[str, ...]:
    """Return a line per kind of doubtful class or image.

    Images are compared by their bytes, if they are in several splits, or in the training split from
    which a missing one is cut. Files are read only if they agree in their size and in a block.
    Images that are generated, and neither files nor parts of files, are not compared.

    Raises:
        DataError: there are some, and ``strict`` is set.
    """
    faults = Faults(strict)
    _report_classes(source, faults)
    _report_copies(source, faults)
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


def _report_copies(source: Source, faults: Faults) -> None:
    by_size: dict[int, list[Sample]] = {}
    for sample in source.samples:
        if os.path.isfile(sample.origin):
            by_size.setdefault(os.path.getsize(sample.origin), []).append(sample)
        elif source.version:
            by_size.setdefault(len(sample.read()), []).append(sample)
    splits = {sample.split for sample in source.samples}
    missing = [split for split in SPLITS if split not in splits]
    for samples in _parted(by_size.values(), missing):
        by_block: dict[bytes, list[Sample]] = {}
        for sample in samples:
            with contextlib.suppress(OSError):  # reported when it is decoded
                by_block.setdefault(_block(sample), []).append(sample)
        for alike in _parted(by_block.values(), missing):
            _report_equal(alike, missing, faults)


def _parted(
    groups: Iterable[Sequence[Sample]], missing: Sequence[str]
) -> Iterator[Sequence[Sample]]:
    """Yield the groups of several images that are in more than one split, or may come to be."""
    for samples in groups:
        splits = {sample.split for sample in samples}
        if len(samples) > 1 and (len(splits) > 1 or (missing and "train" in splits)):
            yield samples


def _block(sample: Sample) -> bytes:
    """Return bytes from the middle of an image's file, where equal formats differ."""
    if not os.path.isfile(sample.origin):
        return b""
    with open(sample.origin, "rb") as file:
        file.seek(max(0, os.path.getsize(sample.origin) - BLOCK_BYTES) // 2)
        return file.read(BLOCK_BYTES)


def _report_equal(samples: Sequence[Sample], missing: Sequence[str], faults: Faults) -> None:
    """Report the images that are equal to one of another split, or of a split that is cut."""
    seen: dict[bytes, Sample] = {}
    for sample in samples:
        try:
            digest = hashlib.sha256(sample.read()).digest()
        except OSError:  # reported when it is decoded
            continue
        first = seen.setdefault(digest, sample)
        if first.split != sample.split:
            faults.add(Fault.LEAKED, sample.origin, first.origin)
        elif first is not sample and missing and sample.split == "train":
            faults.add(Fault.COPIED, sample.origin, first.origin, of=" and ".join(missing))
