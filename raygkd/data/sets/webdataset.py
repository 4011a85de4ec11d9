"""Images in tar files in the layout of webdataset: members KEY.jpg and KEY.cls of each image."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from raygkd.data.faults import Fault, Faults, report_class_names
from raygkd.data.image_files import image_suffixes
from raygkd.data.label_values import check_single_labels, ordered_classes
from raygkd.data.sources import DataSet, Sample, Source, SourceOptions, existing_path
from raygkd.data.splits import split_named
from raygkd.errors import DataError, brief
from raygkd.registry import DATASETS
from raygkd.storage.reading import read_text

# members with the label of an image: a class name or number, or JSON with the key label
LABEL_SUFFIXES = (".cls", ".txt", ".json")
NAME_FILES = ("classes.txt", "classnames.txt")
LABEL_KEYS = ("label", "class", "cls")
COMPRESSED = (".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst")


@dataclass
class _Record:
    """The members of one key.

    Attributes:
        shard: the tar file.
        key: path and name of the members, without suffix.
        image: offset and number of bytes of the image; None without one.
        label: text of the label; None without one.
    """

    shard: Path
    key: str
    image: tuple[int, int] | None = None
    label: str | None = None

    @property
    def place(self) -> str:
        """The tar file and the key."""
        return f"{self.shard}/{self.key}"

    def read(self) -> bytes:
        """Return the encoded image; b"" without one."""
        offset, size = self.image or (0, 0)
        with self.shard.open("rb") as file:
            file.seek(offset)
            return file.read(size)


@DATASETS.register("webdataset")
class WebDataset(DataSet):
    """Tar files with an image and a label (.cls, .txt or .json) for each key."""

    task = "classification"

    @classmethod
    def recognise(cls, root: Path) -> str | None:
        """Return the name of the first tar file."""
        shards = _shards(root)
        return shards[0].name if shards else None

    def open(self, options: SourceOptions) -> Source:
        """Return the images; splits are in the names of the tar files or of their folders."""
        root = existing_path("webdataset", options)
        shards = _shards(root)
        if not shards:
            raise DataError(f"no .tar files in '{root}'; set --data-dir to the folder with them")
        faults = Faults(options.strict)
        labelled: list[tuple[_Record, str]] = []
        for record in (record for shard in shards for record in _records(shard)):
            if record.image is None:
                faults.add(Fault.NO_FILE, record.place)
            elif record.label is None:
                raise DataError(
                    f"{record.place}: no label; every image needs a member .cls, .txt or .json"
                )
            else:
                labelled.append((record, record.label))
        texts = [text for _, text in labelled]
        check_single_labels(texts, str(root))
        names, labels = _classes(root, texts)
        report_class_names(names, str(root), faults)
        samples = [
            Sample(labels[text], _split(record.shard, root), record.place, record.read)
            for record, text in labelled
        ]
        stats = [shard.stat() for shard in shards]
        version = repr([(stat.st_size, stat.st_mtime_ns) for stat in stats])
        return Source("webdataset", tuple(names), samples, faults.warnings(), version)


def _shards(root: Path) -> list[Path]:
    """Return the tar files of a folder and of its folders."""
    if root.is_file():
        return [root] if root.suffix == ".tar" else []
    found = [*root.glob("*.tar"), *root.glob("*/*.tar")]
    packed = [path for path in root.glob("*") if path.name.endswith(COMPRESSED)]
    if packed and not found:
        raise DataError(
            f"'{packed[0]}' is compressed, so it cannot be read at random; decompress it to .tar"
        )
    return sorted(found)


def _split(shard: Path, root: Path) -> str:
    """Return the split that a tar file's folder or a part of its name is named after."""
    words = re.split(r"[^a-zA-Z]+", shard.stem)
    words += [shard.parent.name] if shard.parent != root else []
    return next((split for word in words if (split := split_named(word)) is not None), "train")


def _records(shard: Path) -> Iterator[_Record]:
    """Yield the records of a tar file; members of a key follow each other."""
    suffixes = image_suffixes()
    records: dict[str, _Record] = {}
    try:
        with tarfile.open(shard, "r:") as file:
            end = 0
            for member in file:
                end = member.offset_data + member.size
                folder, _, name = member.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                if not member.isfile() or not stem or not dot:
                    continue
                key = f"{folder}/{stem}" if folder else stem
                record = records.setdefault(key, _Record(shard, key))
                suffix = f".{extension.lower()}"
                if suffix in suffixes:
                    record.image = (member.offset_data, member.size)
                elif suffix in LABEL_SUFFIXES and record.label is None:
                    content = file.extractfile(member)
                    record.label = _label(content.read() if content else b"", suffix, record.place)
        # complete files end with empty blocks
        if end + tarfile.BLOCKSIZE > shard.stat().st_size:
            raise DataError(f"'{shard}' is truncated after {end:,} bytes; copy it again")
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"'{shard}' cannot be read as a tar file: {error}") from error
    yield from records.values()


def _label(content: bytes, suffix: str, place: str) -> str | None:
    """Return the label in a member; None if there is none in it."""
    try:
        text = content.decode("utf-8-sig").strip()
        if suffix != ".json":
            return text or None
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}{suffix}: cannot be read: {error}") from error
    values = [found[key] for key in LABEL_KEYS if key in found] if isinstance(found, dict) else []
    if values and not isinstance(values[0], str | int):
        raise DataError(
            f"{place}{suffix}: label {brief(values[0])}; only one class per image is supported, as "
            "a number or a name"
        )
    return str(values[0]) if values else None


def _classes(root: Path, texts: list[str]) -> tuple[list[str], dict[str, int]]:
    """Return the class names, and text of a label -> label."""
    folder = root.parent if root.is_file() else root
    for path in (folder / name for name in NAME_FILES):
        if path.is_file():
            lines = _lines(path)
            names = [line.strip() for line in lines if line.strip()]
            labels = {name: label for label, name in enumerate(names)}
            labels |= {str(label): label for label in range(len(names))}
            unknown = [text for text in texts if text not in labels]
            if unknown:
                raise DataError(
                    f"label {unknown[0]!r} is not among the {len(names)} classes of '{path}'; add "
                    "it there, or correct the label"
                )
            return names, labels
    names = ordered_classes(texts)
    return names, {name: label for label, name in enumerate(names)}


def _lines(path: Path) -> list[str]:
    try:
        return read_text(path).splitlines()
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}") from error
