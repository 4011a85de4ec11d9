"""Turning a data set into a folder of Parquet shards (their format: ``raygkd.data.parquet``)."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pyarrow.fs

from raygkd.data.audit import audit
from raygkd.data.decoding import decode
from raygkd.data.parquet import resolve
from raygkd.data.seeds import generator
from raygkd.data.shard_writer import ShardWriter
from raygkd.data.sources import Sample, Source
from raygkd.data.splits import SPLITS
from raygkd.errors import DataError

SHARD_BYTES = 128 << 20

CHECKED_AT_ONCE = 64
ORDER_SEED = 0
# file in a folder that is being written, locked by the process that writes
LOCK = ".lock"

Progress = Callable[[int, int], None]


def prepare(
    source: Source,
    destination: str,
    *,
    skip_bad: bool = False,
    strict: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a data set as shards, its rows shuffled within each split by a fixed seed.

    Every image is decoded once to check it. A local destination is created only when it is
    complete: shards are written to DESTINATION.incomplete, and if the process is killed, the next
    call continues after the last complete shard. An object store cannot rename a folder: an
    interrupted write leaves shards without the last one, which ``open_table`` rejects.

    Args:
        source: the data set.
        destination: a folder that does not exist or is empty: a path, ``s3://`` or ``gs://``.
        skip_bad: skip unreadable images instead of stopping.
        strict: stop at doubtful classes and images (``audit``).
        shard_bytes: size of its images at which a shard is closed.
        progress: called with the number of processed images and the total.

    Returns:
        "path", "dataset", "classes" (their number), "images" (written), "splits" (name -> images),
        "bad" (images skipped), "bad_examples" (the first few, with reasons), "shards", "bytes"
        (of the encoded images), "warnings" (the source's and those of ``audit``); for detection
        also "boxes" (written).

    Raises:
        DataError: an image is unreadable and ``skip_bad`` is off (names its path), all images are
            unreadable, or the destination is not empty, cannot be written or is being written.
    """
    if not source.samples:
        raise DataError(f"{source.name} has no images")
    source = replace(source, warnings=(*source.warnings, *audit(source, strict=strict)))
    filesystem, target = resolve(destination)
    is_local = isinstance(filesystem, pyarrow.fs.LocalFileSystem)
    if is_local and os.path.realpath(target) == os.getcwd():
        raise DataError(
            f"'{destination}' is the working folder, which cannot be replaced; choose another"
        )
    with _writing(destination):
        _refuse_existing(filesystem, target, destination)
    folder = f"{target}.incomplete" if is_local else target
    writer = ShardWriter(filesystem, folder, source, shard_bytes, [skip_bad])
    with contextlib.ExitStack() as stack:
        with _writing(destination):
            filesystem.create_dir(folder, recursive=True)
            if is_local:
                stack.enter_context(_locked(folder, destination))
                writer.resume()
        try:
            with _writing(destination), writer:
                _write_images(source, writer, skip_bad=skip_bad, progress=progress)
            if is_local:
                os.unlink(os.path.join(folder, LOCK))
                os.replace(folder, target)
        except BaseException as error:
            # what was written before an interrupt is used by the next call
            if not is_local or isinstance(error, Exception):
                filesystem.delete_dir(folder)
            raise
    return _summary(source, destination, writer)


def _summary(source: Source, destination: str, writer: ShardWriter) -> dict[str, Any]:
    done = writer.done
    summary = {
        "path": destination,
        "dataset": source.name,
        "classes": len(source.class_names),
        "images": sum(done.splits.values()),
        "splits": {split: done.splits.get(split, 0) for split in SPLITS},
        "bad": done.bad,
        "bad_examples": done.bad_examples,
        "shards": writer.shards,
        "bytes": done.bytes,
        "warnings": list(source.warnings),
    }
    return summary | {"boxes": done.boxes} if source.task == "detection" else summary


@contextlib.contextmanager
def _locked(folder: str, destination: str) -> Iterator[None]:
    """Hold the lock of a folder that is being written; a killed process loses it."""
    with open(os.path.join(folder, LOCK), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"another process is writing '{destination}': wait until it has finished"
            ) from error
        yield


@contextlib.contextmanager
def _writing(destination: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # pyarrow's own message spans several sentences
        reason = os.strerror(error.errno) if error.errno else error
        raise DataError(
            f"cannot write to '{destination}': {reason}; choose another folder"
        ) from error


def _refuse_existing(filesystem: pyarrow.fs.FileSystem, target: str, destination: str) -> None:
    kind = filesystem.get_file_info(target).type
    if kind == pyarrow.fs.FileType.File:
        raise DataError(f"'{destination}' is a file; choose a folder that does not exist yet")
    if kind == pyarrow.fs.FileType.Directory and filesystem.get_file_info(
        pyarrow.fs.FileSelector(target)
    ):
        raise DataError(f"'{destination}' is not empty; choose another folder or remove it first")


def _write_images(
    source: Source, writer: ShardWriter, *, skip_bad: bool, progress: Progress | None
) -> None:
    """Write all readable images after those that are written already."""
    first = writer.done.samples
    remaining = itertools.islice(_ordered(source.samples), first, None)
    example = ""
    for done, (sample, image, problem) in enumerate(_checked(remaining), start=first + 1):
        if problem and not skip_bad:
            raise DataError(f"{problem}; remove it or pass --skip-bad")
        if problem:
            example = example or problem
            writer.skip(problem)
        else:
            writer.add(sample, image)
        if progress is not None:
            progress(done, len(source.samples))
    if not writer.has_images:
        number = len(source.samples)
        raise DataError(f"all {number} images of {source.name} are unreadable, such as {example}")
    writer.finish()


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
