"""The interface of data sets; each of ours is a class in a file of ``raygkd.data.sets``.

Shapes: H height, W width.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raygkd.data.boxes import ImageBoxes
from raygkd.errors import ConfigError, DataError, brief, near
from raygkd.registry import DATASETS, entry_name, own_settings
from raygkd.storage.atomic_files import is_remote, local_path
from raygkd.storage.object_store import check_no_secret

VOC_YEARS = ("2007", "2012")


@dataclass(frozen=True, slots=True)
class Sample:
    """One image, read on request, with its label or its boxes.

    Attributes:
        label: index into the class names; 0 for detection.
        split: "train", "val" or "test".
        origin: path of the file, or data set and index; for error messages.
        read: returns the encoded image (PNG, JPEG...); raises OSError if the file is unreadable.
        boxes: its objects, all inside the upright image; None for classification.
        image_id: for detection, name or number of the image in its data set.
    """

    label: int
    split: str
    origin: str
    read: Callable[[], bytes]
    boxes: ImageBoxes | None = None
    image_id: str = ""


@dataclass(frozen=True)
class Source:
    """A data set.

    Attributes:
        name: name in ``--dataset``.
        class_names: name of each class.
        samples: its images in any order; either all or none have boxes.
        warnings: faults that were dropped from its annotations, a line per kind.
        version: changes with the contents of images that are not files of their own.
    """

    name: str
    class_names: tuple[str, ...]
    samples: Sequence[Sample]
    warnings: tuple[str, ...] = ()
    version: str = ""

    @property
    def task(self) -> Literal["classification", "detection"]:
        """The task of its images."""
        boxes = self.samples[0].boxes if self.samples else None
        return "classification" if boxes is None else "detection"


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """How a data set is opened; see ``open_source``."""

    data_dir: Path | None
    download: bool
    strict: bool
    years: tuple[str, ...]
    classes: Sequence[str] | None
    own: Mapping[str, Any] = field(default_factory=dict)
    argument: str = ""


class DataSet(ABC):
    """A value of ``--dataset``.

    ``@DATASETS.register(name)`` registers a subclass. Its own options are the fields of a nested
    dataclass ``Settings``, each declared by ``option``; they are called ``DATASET.OPTION``.

    Attributes:
        task: "classification" or "detection"; None if it depends on the images.
        reads_folder: whether its images may be in ``options.data_dir``.
        can_fetch: whether ``open`` downloads its files if ``options.download`` is set.
        augment: default augmentation; None for the default of its task and image sizes.
        score: metric by which detectors are ranked, "map" or "map50".
        recipe: setting -> default of a run on it, if different from the task's default.
        is_general: a folder that another data set recognises too belongs to that one.
    """

    task: ClassVar[str | None] = None
    reads_folder: ClassVar[bool] = True
    can_fetch: ClassVar[bool] = False
    augment: ClassVar[str | None] = None
    score: ClassVar[str] = "map50"
    recipe: ClassVar[Mapping[str, Any]] = {}
    is_general: ClassVar[bool] = False

    @classmethod
    def recognise(cls, root: Path) -> str | None:
        """Return what shows that a folder or file is of this kind ("data.yaml"); None if it is not.

        It must be cheap: it is called for every registered data set if none is chosen.
        """
        return None

    @abstractmethod
    def open(self, options: SourceOptions) -> Source:
        """Return its images; ``options.own`` has the values of ``Settings``."""


def dataset_class(name: str) -> type[DataSet]:
    """Return a data set's class; the base class if the name is not registered."""
    name = entry_name(name)
    return DATASETS.get(name) if name in DATASETS.names() else DataSet


def check_dataset(name: str, data_dir: str | None) -> None:
    """Refuse an unknown data set, and Parquet files without a place.

    Args:
        name: ``--dataset``.
        data_dir: ``--data-dir``.

    Raises:
        ConfigError: it is unknown, or the place is missing.
    """
    names = [*DATASETS.names(), "parquet"]
    if entry_name(name) not in names:
        raise ConfigError(
            f"--dataset {brief(name)}: unknown{near(name, names)} (known: {', '.join(names)})"
        )
    if name == "parquet" and data_dir is None:
        raise ConfigError("--dataset parquet needs --data-dir: a .parquet file or a folder")


def open_source(
    name: str,
    data_dir: str | Path | None = None,
    download: bool = False,
    *,
    strict: bool = False,
    years: tuple[str, ...] = VOC_YEARS,
    classes: Sequence[str] | None = None,
    own: Mapping[str, Any] | None = None,
) -> Source:
    """Open a data set; its images are read later, one by one.

    Args:
        name: one of ``DATASETS``, such as imagefolder or coco, or NAME:ARGUMENT, as in hf:ORG/NAME.
        data_dir: folder of the files; digits and digits-voc need none.
        download: download missing files of cifar10, cifar100 or voc into ``data_dir``.
        strict: stop at faulty box annotations instead of dropping them.
        years: years of Pascal VOC to train on; "2007" and "2012".
        classes: names of the classes whose boxes are kept; None for all.
        own: the data set's own options that differ from their defaults.

    Raises:
        ConfigError: the name, a year or a class is unknown, or ``data_dir`` is required.
        DataError: files are missing in the folder, or an annotation is faulty in strict mode.
    """
    opened: type[DataSet] = DATASETS.get(entry_name(name))
    if data_dir and is_remote(data_dir):
        check_no_secret(str(data_dir))
        raise ConfigError(
            f"--data-dir {data_dir}: --dataset {name} needs a folder on this machine; copy it "
            "here, or convert it with 'raygkd data prepare'"
        )
    if data_dir and not opened.reads_folder:
        raise ConfigError(f"--data-dir {data_dir}: --dataset {name} has no folder; omit it")
    settings: Any = own_settings(opened)
    options = SourceOptions(
        data_dir=local_path(data_dir) if data_dir else None,
        download=download,
        strict=strict,
        years=years,
        classes=classes,
        own=vars(settings(**(own or {}))) if settings else {},
        argument=name.partition(":")[2],
    )
    source = opened().open(options)
    return source if classes is None else _of_classes(source, classes)


def check_classes(dataset: str, available: Sequence[str], chosen: Sequence[str]) -> None:
    """Check the classes that were chosen from a data set.

    Raises:
        ConfigError: no class was chosen, or the data set does not have one.
    """
    if not chosen:
        raise ConfigError("--classes: name at least one class")
    for name in chosen:
        if name not in available:
            raise ConfigError(
                f"--classes {name!r}: not a class of {dataset}{near(name, available)} "
                f"(known: {', '.join(available)})"
            )


def _of_classes(source: Source, classes: Sequence[str]) -> Source:
    """Return a data set with the boxes of some classes; images without such boxes are kept."""
    if source.task != "detection":
        raise ConfigError(f"--classes: {source.name} has no boxes; omit the option")
    check_classes(source.name, source.class_names, classes)
    kept = [name for name in source.class_names if name in classes]
    new_label = np.array(
        [kept.index(name) if name in kept else -1 for name in source.class_names], np.int64
    )

    def of_kept(boxes: ImageBoxes) -> ImageBoxes:
        label = new_label[boxes.label]
        return replace(boxes, label=label).keep(label >= 0)

    samples = [replace(s, boxes=of_kept(s.boxes)) for s in source.samples if s.boxes is not None]
    return replace(source, class_names=tuple(kept), samples=samples)


def needed_folder(name: str, options: SourceOptions) -> Path:
    """Return the folder of a data set that needs one; ConfigError if it is not set."""
    if options.data_dir is None:
        hint = "; --download fetches them into it" if dataset_class(name).can_fetch else ""
        raise ConfigError(f"--dataset {name} needs --data-dir, the folder with its files{hint}")
    return options.data_dir


def existing_path(name: str, options: SourceOptions) -> Path:
    """Return a data set's folder or file; DataError if it does not exist."""
    root = needed_folder(name, options)
    return root if root.is_file() else existing_folder(name, options)


def existing_folder(name: str, options: SourceOptions) -> Path:
    """Return a data set's folder; DataError if it does not exist."""
    root = needed_folder(name, options)
    if not root.is_dir():
        raise DataError(f"no folder '{root}'; set --data-dir to an existing folder")
    return root


def array_sample(pixels: NDArray[np.uint8], label: int, split: str, origin: str) -> Sample:
    """Return a sample of grey (H, W) or colour (H, W, 3) pixels, which are encoded when read."""
    return Sample(label, split, origin, partial(encode_png, pixels))


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Return a PNG of grey (H, W) or colour (H, W, 3) pixels."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
