"""Data sets of the Hugging Face Hub, and local folders that the package datasets reads."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from raygkd.data.annotations import Annotation, check_boxes, four_numbers, unread_texts
from raygkd.data.faults import Faults, report_class_names
from raygkd.data.image_files import read_of
from raygkd.data.label_values import SUPPORTED, check_single_labels, ordered_classes
from raygkd.data.sources import DataSet, Sample, Source, SourceOptions
from raygkd.data.splits import split_named
from raygkd.errors import ConfigError, DataError
from raygkd.optional_packages import require
from raygkd.registry import DATASETS, option

EXTRA = "datasets"
# names of columns, best first
LABELS = ("label", "labels", "class", "category", "fine_label")
OBJECTS = ("objects", "annotations")
BOXES = ("bbox", "bboxes", "boxes")
BOX_LABELS = ("category", "categories", "category_id", "label", "labels", "class")


@DATASETS.register("hf")
class HubDataset(DataSet):
    """A data set of the Hugging Face Hub (hf:ORG/NAME), or a local folder in its layout."""

    can_fetch = True

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        """Configuration and columns."""

        config: str = option("", "configuration of the data set [default: the data set's own]")
        image: str = option("", "column of the images [default: the first one with images]")
        label: str = option("", "column of the labels [default: found by its type and name]")

    @classmethod
    def recognise(cls, root: Path) -> str | None:
        """Return the file or folder that the package datasets writes."""
        for name in ("dataset_dict.json", "dataset_info.json"):
            if (root / name).is_file():
                return name
        return "data/*.parquet" if any(root.glob("data/*.parquet")) else None

    def open(self, options: SourceOptions) -> Source:
        """Return the images with their labels, or with boxes in the column objects.

        Boxes are [x, y, width, height] in pixels, as in COCO.
        """
        splits = _splits(options)
        faults = Faults(options.strict)
        columns = _columns(next(iter(splits.values())).features, options.own)
        name = "hf-" + (options.argument or str(options.data_dir)).strip("/").replace("/", "-")
        samples, class_names = _samples(splits, *columns, faults)
        report_class_names(class_names, name, faults)
        version = repr([split._fingerprint for split in splits.values()])
        return Source(name, tuple(class_names), samples, faults.warnings(), version)


def _splits(options: SourceOptions) -> dict[str, Any]:
    """Return split -> ``datasets.Dataset``."""
    require("datasets", of="--dataset hf", extra=EXTRA)
    import datasets

    datasets.disable_progress_bars()
    place = options.argument or options.data_dir
    if not place:
        raise ConfigError("--dataset hf: name a data set, as in hf:ORG/NAME, or set --data-dir")
    try:
        loaded = _load(datasets, place, options)
    # the package raises almost any type of exception for what it cannot read
    except Exception as error:
        reason = " ".join(str(error).split())
        hint = "" if options.download or not options.argument else "; --download fetches it"
        raise DataError(f"--dataset hf: '{place}' cannot be loaded: {reason}{hint}") from error
    parts = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    if len(parts) == 1:
        return {"train": next(iter(parts.values()))}
    found: dict[str, Any] = {}
    for name, part in parts.items():
        split = split_named(name)
        if split is None or split in found:
            raise DataError(
                f"--dataset hf: '{place}' has the splits {', '.join(parts)}; expected train, "
                "validation and test"
            )
        found[split] = part
    if "train" not in found:
        raise DataError(f"--dataset hf: '{place}' has the splits {', '.join(parts)}, but no train")
    return found


def _load(datasets: Any, place: str | Path, options: SourceOptions) -> Any:
    if options.argument:
        config = datasets.DownloadConfig(local_files_only=not options.download)
        name = options.own["config"] or None
        return datasets.load_dataset(str(place), name, download_config=config)
    root = Path(place)
    if any((root / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return datasets.load_from_disk(str(root))
    return datasets.load_dataset(str(root), options.own["config"] or None)


def _columns(features: Mapping[str, Any], own: Mapping[str, str]) -> tuple[str, str]:
    """Return the names of the columns of images, and of labels or objects."""
    import datasets

    for name in (own["image"], own["label"]):
        if name and name not in features:
            raise ConfigError(f"hf: no column {name!r} (columns: {', '.join(features)})")
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    classes = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    image = own["image"] or next(iter(images), None)
    known = [name for name in (*OBJECTS, *LABELS) if name in features]
    first = [name for name in known if name in classes or name in OBJECTS]
    label = own["label"] or next(iter([*first, *classes, *known]), None)
    if image is None or label is None:
        raise DataError(
            f"hf: the columns are {', '.join(features)}; expected images, and a column label or "
            "objects; name them with --set hf.image=COLUMN and hf.label=COLUMN"
        )
    return image, label


def _samples(
    splits: Mapping[str, Any], image: str, label: str, faults: Faults
) -> tuple[list[Sample], list[str]]:
    """Return the images of all splits, and the class names."""
    import datasets

    feature = splits["train"].features[label]
    parts = {
        split: part.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        for split, part in splits.items()
    }
    targets = {split: list(part[label]) for split, part in splits.items()}
    if label in OBJECTS:
        return _boxed(parts, targets, image, feature, faults)
    texts, names = _labels(targets, feature, label)
    labels = {text: number for number, text in enumerate(names)}
    samples = [
        Sample(labels[text], split, f"{split} {row}", partial(_encoded, part, row, image))
        for split, part in parts.items()
        for row, text in enumerate(texts[split])
    ]
    return samples, names


def _labels(
    targets: Mapping[str, Sequence[Any]], feature: Any, column: str
) -> tuple[dict[str, list[str]], list[str]]:
    """Return the class name of each image by split, and all class names."""
    import datasets

    first = next(iter(targets.values()))[0]
    if isinstance(first, list | dict):
        raise DataError(f"hf: column {column} has lists (multi-label data); {SUPPORTED}")
    if isinstance(first, float):
        raise DataError(f"hf: column {column} has numbers such as {first}; {SUPPORTED}")
    is_named = isinstance(feature, datasets.ClassLabel)
    texts: dict[str, list[str]] = {}
    for split, values in targets.items():
        for row, value in enumerate(values):
            if value is None or (is_named and not 0 <= value < feature.num_classes):
                raise DataError(f"hf: {split} row {row}: no label; every row needs one")
        texts[split] = [feature.int2str(value) if is_named else str(value) for value in values]
    if is_named:
        return texts, list(feature.names)
    every = [text for part in texts.values() for text in part]
    check_single_labels(every, f"hf column {column}")
    return texts, ordered_classes(every)


def _boxed(
    parts: Mapping[str, Any],
    targets: Mapping[str, Sequence[Any]],
    image: str,
    feature: Any,
    faults: Faults,
) -> tuple[list[Sample], list[str]]:
    """Return the images with their boxes, and the class names."""
    fields = list(_object_fields(feature))
    box, category = (
        next((name for name in known if name in fields), None) for known in (BOXES, BOX_LABELS)
    )
    if box is None or category is None:
        raise DataError(
            f"hf: the objects have the fields {', '.join(fields)}; expected bbox and category"
        )
    kind = _inner(_object_fields(feature)[category])
    rows = {split: [_by_field(value) for value in values] for split, values in targets.items()}
    found = {str(v) for values in rows.values() for row in values for v in row.get(category, ())}
    names = list(getattr(kind, "names", None) or ordered_classes(found))
    labels = {name: label for label, name in enumerate(names)}
    samples = []
    for split, part in parts.items():
        for number, row in enumerate(rows[split]):
            read = partial(_encoded, part, number, image)
            values = row.get(category, [])
            texts = [kind.int2str(v) if hasattr(kind, "int2str") else str(v) for v in values]
            annotation = _annotation(f"{split} {number}", read(), row.get(box, []), texts)
            boxes = check_boxes(annotation, labels, faults)
            samples.append(Sample(0, split, f"{split} {number}", read, boxes, str(number)))
    return samples, names


def _annotation(
    place: str, encoded: bytes, boxes: Sequence[Sequence[float]], names: list[str]
) -> Annotation:
    """Return the annotation of an image whose boxes are [x, y, width, height]."""
    sides = [four_numbers(box) for box in boxes]
    xyxy_M4 = np.array(sides, np.float64).reshape(-1, 4)
    xyxy_M4[:, 2:] += xyxy_M4[:, :2]
    return Annotation(
        place=place,
        image_id=place,
        image=io.BytesIO(encoded),
        size=None,
        marks=[f"box {number}" for number in range(len(boxes))],
        names=names,
        xyxy=xyxy_M4,
        unread=unread_texts(boxes, sides),
        difficult=np.zeros(len(boxes), bool),
        crowd=np.zeros(len(boxes), bool),
    )


def _object_fields(feature: Any) -> Mapping[str, Any]:
    """Return the fields of a list of objects, or of an object of lists."""
    inner = _inner(feature)
    return inner if isinstance(inner, Mapping) else {}


def _inner(feature: Any) -> Any:
    """Return the type of a list's elements; a type that is not a list as it is."""
    return getattr(feature, "feature", feature)


def _by_field(value: Any) -> dict[str, list[Any]]:
    """Return field -> values of the objects of an image."""
    if isinstance(value, Mapping):
        return {name: list(values or ()) for name, values in value.items()}
    objects = list(value or ())
    return {name: [entry[name] for entry in objects] for name in (objects[0] if objects else ())}


def _encoded(part: Any, row: int, column: str) -> bytes:
    stored = part[row][column]
    if stored is None:
        return b""
    if stored["bytes"] is not None:
        return stored["bytes"]
    return read_of(Path(stored["path"]))()
