"""Writing of Parquet shards (their format: ``raygkd.data.parquet``), resumed after a kill."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from raygkd.data import box_columns
from raygkd.data.footers import FORMAT_VERSION, METADATA_KEY, TOTAL_KEY
from raygkd.data.image_files import shown_name
from raygkd.data.parquet import COLUMNS, DETECTION_COLUMNS, DIGEST_KEY
from raygkd.data.sources import Sample, Source

COMPRESSED = ("label", "image_id", "split", "origin")
ROW_GROUP_ROWS = 256
ROW_GROUP_BYTES = 32 << 20
BAD_EXAMPLES = 5
# what was written up to the end of a shard, in its footer
PROGRESS_KEY = b"raygkd.progress"
UNFINISHED = ".unfinished"


@dataclass
class Progress:
    """What has been written of a data set.

    Attributes:
        samples: samples that were processed, also unreadable ones.
        splits: split -> images written.
        bytes: size of the encoded images written.
        boxes: boxes written.
        bad: unreadable images.
        bad_examples: the first of them, with reasons.
    """

    samples: int = 0
    splits: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    boxes: int = 0
    bad: int = 0
    bad_examples: list[str] = field(default_factory=list)


class ShardWriter:
    """Collects images into row groups and row groups into shards, in bounded memory.

    A row group ends at ``ROW_GROUP_ROWS`` rows, ``ROW_GROUP_BYTES`` bytes or a new split. A shard
    gets its name when it is complete.

    Args:
        filesystem: where the shards are written.
        folder: their folder.
        source: the data set.
        shard_bytes: size of its images at which a shard is closed.
        choices: values besides these on which the shards depend.
    """

    def __init__(
        self,
        filesystem: pyarrow.fs.FileSystem,
        folder: str,
        source: Source,
        shard_bytes: int,
        choices: list[Any],
    ):
        self.shards = 0
        self.done = Progress()
        self._filesystem = filesystem
        self._folder = folder
        self._shard_bytes = shard_bytes
        # an object store shows files only when they are complete
        is_local = isinstance(filesystem, pyarrow.fs.LocalFileSystem)
        self._suffix = UNFINISHED if is_local else ""
        self._identity = source_identity(source, [shard_bytes, *choices])
        columns = DETECTION_COLUMNS if source.task == "detection" else COLUMNS
        self._schema = columns.with_metadata({METADATA_KEY: _metadata(source)})
        self._shard: Any = None  # pq.ParquetWriter of the shard that is open
        self._digest = hashlib.sha256()
        self._bytes_in_shard = 0
        self._group: list[dict[str, Any]] = []
        self._bytes_in_group = 0
        # of the samples in the group that is not written yet
        self._pending = Progress()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        # an open upload would finish after the folder is removed
        if self._shard is not None:
            shard, self._shard = self._shard, None
            shard.close()

    @property
    def has_images(self) -> bool:
        """Whether an image was added."""
        return bool(self._group) or sum(self.done.splits.values()) > 0

    def resume(self) -> None:
        """Continue after the complete shards of an interrupted write; remove all other files."""
        while (progress := self._progress_of(self._path(self.shards))) is not None:
            self.done = progress
            self.shards += 1
        kept = {os.path.basename(self._path(shard)) for shard in range(self.shards)}
        for name in os.listdir(self._folder):
            if name not in kept and not name.startswith("."):
                os.unlink(os.path.join(self._folder, name))

    def add(self, sample: Sample, image: bytes) -> None:
        """Add one image."""
        if self._group and (
            len(self._group) == ROW_GROUP_ROWS
            or self._bytes_in_group + len(image) > ROW_GROUP_BYTES
            or self._group[-1]["split"] != sample.split
        ):
            self._write_group()
        row: dict[str, Any] = {"image": image, "split": sample.split}
        row["origin"] = shown_name(sample.origin)
        if sample.boxes is None:
            row["label"] = sample.label
        else:
            row |= {"image_id": shown_name(sample.image_id), **box_columns.to_columns(sample.boxes)}
            self._pending.boxes += len(sample.boxes)
        self._group.append(row)
        self._bytes_in_group += len(image)
        self._pending.samples += 1

    def skip(self, problem: str) -> None:
        """Count an unreadable image."""
        self._pending.samples += 1
        self._pending.bad += 1
        if len(self._pending.bad_examples) < BAD_EXAMPLES:
            self._pending.bad_examples.append(problem)

    def finish(self) -> None:
        """Write the remaining images and close the last shard, which states their number."""
        self._write_group()
        self._close_shard({TOTAL_KEY: str(sum(self.done.splits.values()))})

    def _write_group(self) -> None:
        if self._shard is not None and self._bytes_in_shard >= self._shard_bytes:
            self._close_shard({})
        if self._group:
            self._shard = self._shard or self._open_shard()
            self._shard.write_table(pa.Table.from_pylist(self._group, self._schema))
            for row in self._group:
                self._digest.update(row["image"])
            split = self._group[0]["split"]
            self.done.splits[split] = self.done.splits.get(split, 0) + len(self._group)
        self._bytes_in_shard += self._bytes_in_group
        self.done.bytes += self._bytes_in_group
        self.done.samples += self._pending.samples
        self.done.boxes += self._pending.boxes
        self.done.bad += self._pending.bad
        examples = [*self.done.bad_examples, *self._pending.bad_examples]
        self.done.bad_examples = examples[:BAD_EXAMPLES]
        self._group, self._bytes_in_group, self._pending = [], 0, Progress()

    def _open_shard(self) -> pq.ParquetWriter:
        self._digest = hashlib.sha256()
        self._bytes_in_shard = 0
        # images are already compressed, and their statistics would contain whole images
        return pq.ParquetWriter(
            self._path(self.shards) + self._suffix,
            self._schema,
            filesystem=self._filesystem,
            compression={"image": "NONE"} | dict.fromkeys(COMPRESSED, "ZSTD"),
            use_dictionary=["split"],
            write_statistics=["label", "split"],
        )

    def _close_shard(self, footer: dict[bytes, str]) -> None:
        shard, self._shard = self._shard, None
        progress = json.dumps({"source": self._identity, **asdict(self.done)})
        facts = {DIGEST_KEY: self._digest.hexdigest(), PROGRESS_KEY: progress, **footer}
        shard.add_key_value_metadata(facts)
        shard.close()
        path = self._path(self.shards)
        if self._suffix:
            self._filesystem.move(path + self._suffix, path)
        self.shards += 1

    def _path(self, shard: int) -> str:
        return f"{self._folder}/part-{shard:05d}.parquet"

    def _progress_of(self, path: str) -> Progress | None:
        """Return what is written up to a shard; None if it is missing or of other data."""
        if not os.path.isfile(path):
            return None
        with pq.ParquetFile(path) as file:
            footer = file.metadata.metadata or {}
        facts = json.loads(footer.get(PROGRESS_KEY, b"{}"))
        is_last = TOTAL_KEY in footer
        if facts.pop("source", None) != self._identity or is_last:
            return None
        return Progress(**facts)


def source_identity(source: Source, choices: list[Any]) -> str:
    """Return a hash that changes with the files, their labels or boxes, and the choices."""
    digest = hashlib.sha256(
        json.dumps([list(source.class_names), source.version, *choices]).encode()
    )
    for sample in source.samples:
        stat = os.stat(sample.origin) if os.path.exists(sample.origin) else None
        file_facts = [stat.st_size, stat.st_mtime_ns] if stat else []
        columns = [] if sample.boxes is None else vars(sample.boxes).values()
        objects = [column.tolist() for column in columns]
        facts = [sample.origin, sample.label, sample.split, *objects, *file_facts]
        digest.update(json.dumps(facts).encode())
    return digest.hexdigest()[:16]


def _metadata(source: Source) -> bytes:
    facts: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "dataset": source.name,
        "classes": list(source.class_names),
    }
    if source.task == "detection":
        facts["task"] = "detection"
    if source.warnings:
        facts["warnings"] = list(source.warnings)
    return json.dumps(facts).encode()
