"""Turning a data set into a folder of Parquet shards (their format: ``raygkd.data.parquet``)."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from raygkd.data import box_columns
from raygkd.data.decoding import decode
from raygkd.data.parquet import (
    COLUMNS,
    DETECTION_COLUMNS,
    DIGEST_KEY,
    FORMAT_VERSION,
    METADATA_KEY,
    TOTAL_KEY,
    resolve,
)
from raygkd.data.seeds import generator
from raygkd.data.sources import Sample, Source
from raygkd.data.splits import SPLITS
from raygkd.errors import DataError

COMPRESSED = ("label", "image_id", "split", "origin")
ROW_GROUP_ROWS = 256
ROW_GROUP_BYTES = 32 << 20
SHARD_BYTES = 128 << 20

CHECKED_AT_ONCE = 64
BAD_EXAMPLES = 5
ORDER_SEED = 0

Progress = Callable[[int, int], None]

_log = logging.getLogger("raygkd.data")


def prepare(
    source: Source,
    destination: str,
    *,
    skip_bad: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a data set as shards, its rows shuffled within each split by a fixed seed.

    Every image is decoded once to check it. A local destination is created only when it is
    complete. An object store cannot rename a folder: an interrupted write leaves shards without the
    last one, which ``open_table`` rejects. Faulty annotations that the source drops are logged as
    warnings.

    Args:
        source: the data set.
        destination: a folder that does not exist or is empty: a path, ``s3://`` or ``gs://``.
        skip_bad: skip unreadable images instead of stopping.
        shard_bytes: size of its images at which a shard is closed.
        progress: called with the number of processed images and the total.

    Returns:
        "path", "dataset", "classes" (their number), "images" (written), "splits" (name -> images),
        "bad" (images skipped), "bad_examples" (the first few, with reasons), "shards", "bytes"
        (of the encoded images); for detection also "boxes" (written) and "warnings" (the source's).

    Raises:
        DataError: an image is unreadable and ``skip_bad`` is off (names its path), all images are
            unreadable, or the destination is not empty or cannot be written.
    """
    for warning in source.warnings:
        _log.warning(warning)
    filesystem, target = resolve(destination)
    with _writing(destination):
        _refuse_existing(filesystem, target, destination)
    is_local = isinstance(filesystem, pyarrow.fs.LocalFileSystem)
    folder = f"{target}.incomplete-{os.getpid()}" if is_local else target
    try:
        with _writing(destination):
            filesystem.create_dir(folder, recursive=True)
            with _ShardWriter(filesystem, folder, source, shard_bytes) as writer:
                counts, bad = _write_images(source, writer, skip_bad=skip_bad, progress=progress)
            if is_local:
                os.replace(folder, target)
    except BaseException:
        if filesystem.get_file_info(folder).type == pyarrow.fs.FileType.Directory:
            filesystem.delete_dir(folder)
        raise
    summary = {
        "path": destination,
        "dataset": source.name,
        "classes": len(source.class_names),
        "images": counts.total(),
        "splits": {split: counts[split] for split in SPLITS},
        "bad": len(bad),
        "bad_examples": bad[:BAD_EXAMPLES],
        "shards": writer.shards,
        "bytes": writer.bytes,
    }
    if source.task == "detection":
        summary |= {"boxes": writer.boxes, "warnings": list(source.warnings)}
    return summary


@contextlib.contextmanager
def _writing(destination: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # pyarrow's own message spans several sentences
        reason = os.strerror(error.errno) if error.errno else error
        raise DataError(
            f"cannot write to '{destination}': {reason}; give another folder"
        ) from error


def _refuse_existing(filesystem: pyarrow.fs.FileSystem, target: str, destination: str) -> None:
    kind = filesystem.get_file_info(target).type
    if kind == pyarrow.fs.FileType.File:
        raise DataError(f"'{destination}' is a file: give a folder that does not exist yet")
    if kind == pyarrow.fs.FileType.Directory and filesystem.get_file_info(
        pyarrow.fs.FileSelector(target)
    ):
        raise DataError(f"'{destination}' is not empty: give another folder or remove it first")


def _write_images(
    source: Source, writer: _ShardWriter, *, skip_bad: bool, progress: Progress | None
) -> tuple[Counter[str], list[str]]:
    """Write all readable images; return the count of each split, and the unreadable images."""
    if not source.samples:
        raise DataError(f"{source.name} has no images")
    counts: Counter[str] = Counter()
    bad: list[str] = []
    for done, (sample, image, problem) in enumerate(_checked(_ordered(source.samples)), start=1):
        if not problem:
            writer.add(sample, image)
            counts[sample.split] += 1
        elif skip_bad:
            bad.append(problem)
        else:
            raise DataError(f"{problem}; remove it or pass --skip-bad")
        if progress is not None:
            progress(done, len(source.samples))
    if not counts:
        raise DataError(f"all {len(bad)} images of {source.name} are unreadable, such as {bad[0]}")
    writer.finish()
    return counts, bad


def _ordered(samples: Sequence[Sample]) -> Iterator[Sample]:
    """Yield the samples split by split, shuffled so that consecutive images have mixed classes."""
    order = generator(ORDER_SEED).permutation(len(samples))
    for split in SPLITS:
        yield from (samples[index] for index in order if samples[index].split == split)


def _checked(samples: Iterable[Sample]) -> Iterator[tuple[Sample, bytes, str]]:
    """Yield each sample with its bytes and its problem (or ""), decoding in threads."""
    iterator = iter(samples)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while chunk := list(itertools.islice(iterator, CHECKED_AT_ONCE)):
            yield from pool.map(_check, chunk)


def _check(sample: Sample) -> tuple[Sample, bytes, str]:
    try:
        image = sample.read()
        decode(image)
    except OSError as error:
        return sample, b"", f"{sample.origin}: cannot be read ({error.strerror or error})"
    except ValueError as error:
        return sample, b"", f"{sample.origin}: {error}"
    return sample, image, ""


class _ShardWriter:
    """Collects images into row groups and row groups into shards, in bounded memory.

    A row group ends at ``ROW_GROUP_ROWS`` rows, ``ROW_GROUP_BYTES`` bytes or a new split.
    """

    def __init__(
        self, filesystem: pyarrow.fs.FileSystem, folder: str, source: Source, shard_bytes: int
    ):
        self.shards = 0
        self.bytes = 0
        self.boxes = 0
        self._filesystem = filesystem
        self._folder = folder
        self._shard_bytes = shard_bytes
        columns = DETECTION_COLUMNS if source.task == "detection" else COLUMNS
        self._schema = columns.with_metadata({METADATA_KEY: _metadata(source)})
        self._shard: Any = None  # pq.ParquetWriter of the shard that is open
        self._digest = hashlib.sha256()
        self._bytes_in_shard = 0
        self._images = 0
        self._group: list[dict[str, Any]] = []
        self._bytes_in_group = 0

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        # an open upload would finish after the folder is removed
        if self._shard is not None:
            self._close_shard({})

    def add(self, sample: Sample, image: bytes) -> None:
        """Add one image."""
        if self._group and (
            len(self._group) == ROW_GROUP_ROWS
            or self._bytes_in_group + len(image) > ROW_GROUP_BYTES
            or self._group[-1]["split"] != sample.split
        ):
            self._write_group()
        row: dict[str, Any] = {"image": image, "split": sample.split, "origin": sample.origin}
        if sample.boxes is None:
            row["label"] = sample.label
        else:
            row |= {"image_id": sample.image_id, **box_columns.to_columns(sample.boxes)}
            self.boxes += len(sample.boxes)
        self._group.append(row)
        self._bytes_in_group += len(image)

    def finish(self) -> None:
        """Write the remaining images and close the last shard, which states their number."""
        self._write_group()
        self._close_shard({TOTAL_KEY: str(self._images)})

    def _write_group(self) -> None:
        if self._shard is not None and self._bytes_in_shard >= self._shard_bytes:
            self._close_shard({})
        if self._shard is None:
            self._shard = self._open_shard()
        self._shard.write_table(pa.Table.from_pylist(self._group, self._schema))
        for row in self._group:
            self._digest.update(row["image"])
        self._images += len(self._group)
        self.bytes += self._bytes_in_group
        self._bytes_in_shard += self._bytes_in_group
        self._group, self._bytes_in_group = [], 0

    def _open_shard(self) -> pq.ParquetWriter:
        path = f"{self._folder}/part-{self.shards:05d}.parquet"
        self.shards += 1
        self._digest = hashlib.sha256()
        self._bytes_in_shard = 0
        # images are already compressed, and their statistics would contain whole images
        return pq.ParquetWriter(
            path,
            self._schema,
            filesystem=self._filesystem,
            compression={"image": "NONE"} | dict.fromkeys(COMPRESSED, "ZSTD"),
            use_dictionary=["split"],
            write_statistics=["label", "split"],
        )

    def _close_shard(self, footer: dict[bytes, str]) -> None:
        shard, self._shard = self._shard, None
        shard.add_key_value_metadata({DIGEST_KEY: self._digest.hexdigest(), **footer})
        shard.close()


def _metadata(source: Source) -> bytes:
    facts = {
        "version": FORMAT_VERSION,
        "dataset": source.name,
        "classes": list(source.class_names),
    }
    if source.task == "detection":
        facts["task"] = "detection"
    return json.dumps(facts).encode()
