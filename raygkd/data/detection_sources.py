"""Data sets with boxes: Pascal VOC, COCO, folders in their layouts, and scenes of digits."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from raygkd.data.annotations import (
    Annotation,
    Fault,
    Faults,
    check_boxes,
    load_coco,
    read_coco,
    read_voc,
)
from raygkd.data.scenes import SCENES, make_scenes, scene_name, write_scenes
from raygkd.data.sources import (
    IMAGE_SUFFIXES,
    VOC_YEARS,
    DataSet,
    Sample,
    Source,
    SourceOptions,
    check_classes,
    existing_folder,
    needed_folder,
)
from raygkd.data.splits import SPLITS
from raygkd.errors import ConfigError, DataError
from raygkd.registry import DATASETS

# a pair for photographs, and how it is trained
PHOTOGRAPHS = {
    "teacher": "fasterrcnn_resnet50_fpn",
    "student": "fasterrcnn_resnet18_fpn",
    "teacher_epochs": 20,
    "lr": 1e-4,
}
DIGITS = tuple("0123456789")
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
VOC_LAYOUT = "the folders JPEGImages and Annotations, there or below VOCdevkit"
VOC_FOLDERS = [f"VOC{year}" for year in VOC_YEARS]
COCO_NAME = re.compile(r"(?:instances_)?((train|val|test)\d*)")
COCO_LAYOUT = "annotations/instances_train*.json with its folder of images, or a single .json file"

Annotated = list[tuple[str, Annotation]]
"""Split and contents of each annotation."""

VocPart = tuple[str, Path, list[str]]
"""Split, folder in VOC layout, and ids of the images of that folder."""


@DATASETS.register("voc")
class Voc(DataSet):
    """Pascal VOC, or any folder in its layout, see ``_voc``."""

    task = "detection"
    can_fetch = True
    recipe = PHOTOGRAPHS

    def open(self, options: SourceOptions) -> Source:
        """Return the images with their boxes."""
        return _voc(options)


@DATASETS.register("coco")
class Coco(DataSet):
    """COCO, or any instances file in its format, see ``_coco``."""

    task = "detection"
    score = "map"
    recipe = PHOTOGRAPHS

    def open(self, options: SourceOptions) -> Source:
        """Return the images with their boxes."""
        return _coco(options)


@DATASETS.register("digits-voc")
class DigitScenes(DataSet):
    """Scenes of handwritten digits, with a pair that learns in minutes on a CPU."""

    task = "detection"
    augment = "jitter"
    recipe: ClassVar[Mapping[str, Any]] = {
        "teacher": "fasterrcnn_resnet18_fpn64",
        "student": "fasterrcnn_mobilenet_v3_small_fpn64",
        "epochs": 5,
        "teacher_epochs": 6,
        "lr": 3e-3,
    }

    def open(self, options: SourceOptions) -> Source:
        """Return the scenes with their boxes."""
        return _digits_voc(options)


def _voc(options: SourceOptions) -> Source:
    """Pascal VOC (Everingham et al. 2010), or any folder in its layout with its own classes.

    Below folders VOC2007 and VOC2012: trained on trainval of the years chosen, tested on test of
    2007. A folder in VOC layout by itself: train.txt, val.txt and test.txt in ImageSets/Main, or
    trainval.txt and test.txt, or without any list all images for training.

    The classes of VOC2007 and VOC2012 are VOC's 20 where no others occur in the training
    annotations; of other folders, those that occur there, sorted.
    """
    if options.download:
        _download_voc(needed_folder("voc", options), options.years)
    root = existing_folder("voc", options)
    faults = Faults(options.strict)
    parts = _voc_parts(root, options.years)
    annotated = [
        (split, annotation)
        for split, folder, image_ids in parts
        for annotation in _voc_annotations(folder, image_ids, faults)
    ]
    trained = (annotation.names for split, annotation in annotated if split == "train")
    found = {name for names in trained for name in names if name}
    is_voc = any(folder.name in VOC_FOLDERS for _, folder, _ in parts)
    class_names = VOC_CLASSES if is_voc and found <= set(VOC_CLASSES) else sorted(found)
    return _detection_source("voc", root, class_names, annotated, faults)


def _coco(options: SourceOptions) -> Source:
    """COCO (arXiv 1405.0312), or any instances file in its format with a folder of images.

    instances_val is the test split unless there is an instances_test: the test images of COCO
    itself have no public annotations. A single file is all for training. The classes are those of
    the training file, in the order of their ids.
    """
    root = needed_folder("coco", options)
    if not root.is_file():
        root = existing_folder("coco", options)
    faults = Faults(options.strict)
    annotated: Annotated = []
    class_names: list[str] = []
    # the training file is the first
    for split, path in _coco_files(root).items():
        contents = load_coco(path)
        names, annotations = read_coco(contents, path, _coco_folder(contents, path), faults)
        class_names = class_names or names
        annotated += ((split, annotation) for annotation in annotations)
    return _detection_source("coco", root, class_names, annotated, faults)


def _digits_voc(options: SourceOptions) -> Source:
    """Scenes of handwritten digits; with a folder, they are stored there in VOC layout."""
    root = options.data_dir
    if root is not None:
        if not root.exists() or (root.is_dir() and not any(root.iterdir())):
            if options.classes is not None:
                check_classes("digits-voc", DIGITS, options.classes)
            write_scenes(root, images=SCENES)
        return replace(_voc(replace(options, download=False)), name="digits-voc")
    samples = [
        Sample(
            0,
            split,
            f"digits-voc {scene_name(split, index)}",
            scene.png,
            scene.boxes,
            scene_name(split, index),
        )
        for split, count in SCENES.items()
        for index, scene in enumerate(make_scenes(split, count))
    ]
    return Source("digits-voc", DIGITS, samples)


def _detection_source(
    name: str, root: Path, class_names: Sequence[str], annotated: Annotated, faults: Faults
) -> Source:
    """Return the existing images, each once, with their valid boxes."""
    labels = {class_name: label for label, class_name in enumerate(class_names)}
    samples: dict[Path, Sample] = {}
    for split, annotation in annotated:
        path = annotation.image
        if path in samples:
            faults.add(Fault.REPEATED, annotation.place, str(path))
        elif not os.path.isfile(path):
            faults.add(Fault.NO_FILE, annotation.place, str(path))
        else:
            boxes = check_boxes(annotation, labels, faults)
            samples[path] = Sample(0, split, str(path), path.read_bytes, boxes, annotation.image_id)
    if not any(sample.boxes for sample in samples.values() if sample.split == "train"):
        dropped = "; ".join(faults.warnings()) or "the training annotations have none"
        raise DataError(f"no usable training boxes in '{root}': {dropped}")
    return Source(name, tuple(class_names), list(samples.values()), faults.warnings())


def _download_voc(root: Path, years: tuple[str, ...]) -> None:
    """Fetch trainval of the years and test of 2007, where they are missing."""
    from torchvision.datasets import VOCDetection

    _check_years(years)
    for year, part in (("2007", "trainval"), ("2007", "test"), ("2012", "trainval")):
        listed = _image_sets(root / "VOCdevkit" / f"VOC{year}")
        if part not in listed and (year in years or part == "test"):
            try:
                VOCDetection(root, year=year, image_set=part, download=True)
            except (OSError, RuntimeError) as error:
                raise DataError(f"voc cannot be downloaded into '{root}': {error}") from error


def _check_years(years: tuple[str, ...]) -> None:
    if not years or not set(years) <= set(VOC_YEARS):
        allowed = " and ".join(VOC_YEARS)
        raise ConfigError(f"--years {','.join(years)!r}: must be {allowed}, or one of them")


def _voc_parts(root: Path, years: tuple[str, ...]) -> list[VocPart]:
    _check_years(years)
    folders = _voc_folders(root)
    if not folders:
        raise DataError(
            f"no VOC layout in '{root}': expected {VOC_LAYOUT}; --dataset voc --download downloads "
            "Pascal VOC"
        )
    of_year = {
        year: folder for folder in folders for year in VOC_YEARS if folder.name == f"VOC{year}"
    }
    if of_year and folders != [root]:
        return _year_parts(root, of_year, years)
    if len(folders) > 1:
        names = " and ".join(f"'{folder}'" for folder in folders)
        raise DataError(f"{names} are separate data sets: set --data-dir to one of them")
    return _own_parts(folders[0])


def _voc_folders(root: Path) -> list[Path]:
    """Return the folder in VOC layout, or those next below, with or without VOCdevkit."""

    def is_voc(folder: Path) -> bool:
        return (folder / "JPEGImages").is_dir() and (folder / "Annotations").is_dir()

    for above in (root, root / "VOCdevkit"):
        if is_voc(above):
            return [above]
        found = sorted(folder for folder in above.glob("*") if is_voc(folder))
        if found:
            return found
    return []


def _year_parts(root: Path, folders: dict[str, Path], years: tuple[str, ...]) -> list[VocPart]:
    parts: list[VocPart] = []
    for year in dict.fromkeys(years):
        if year not in folders:
            raise DataError(
                f"no VOC{year} in '{root}': add --download, or train on --years {','.join(folders)}"
            )
        lists = _image_sets(folders[year])
        if "trainval" not in lists:
            raise DataError(
                f"no ImageSets/Main/trainval.txt in '{folders[year]}'; if that is your own data "
                "set, set --data-dir to it"
            )
        parts.append(("train", folders[year], _listed(lists["trainval"])))
    lists = _image_sets(folders["2007"]) if "2007" in folders else {}
    if "test" in lists:
        parts.append(("test", folders["2007"], _listed(lists["test"])))
    return parts


def _own_parts(folder: Path) -> list[VocPart]:
    lists = _image_sets(folder)
    if not lists:
        found = [*folder.glob("Annotations/*.xml"), *_image_files(folder)]
        return [("train", folder, sorted({path.stem for path in found}))]
    names = {"train": "trainval", "test": "test"}
    if "train" in lists:
        names = {"train": "train", "val": "val", "test": "test"}
    if names["train"] not in lists:
        raise DataError(
            f"no train.txt or trainval.txt in '{folder}/ImageSets/Main': add one, or remove "
            "ImageSets to train on all images"
        )
    return [(split, folder, _listed(lists[name])) for split, name in names.items() if name in lists]


def _image_sets(folder: Path) -> dict[str, Path]:
    """Return the lists of image ids of a folder in VOC layout, by name."""
    return {path.stem: path for path in folder.glob("ImageSets/Main/*.txt")}


def _listed(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"'{path}' cannot be read: {error}") from error
    image_ids = [line.strip() for line in lines if line.strip()]
    if not image_ids:
        raise DataError(f"'{path}' lists no image: fill it or remove it")
    return image_ids


def _image_files(folder: Path) -> list[Path]:
    files = (folder / "JPEGImages").iterdir()
    return sorted(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES)


def _voc_annotations(
    folder: Path, image_ids: Iterable[str], faults: Faults
) -> Iterator[Annotation]:
    files = _image_files(folder)
    images = {path.stem: path for path in files} | {path.name: path for path in files}
    for image_id in image_ids:
        path = folder / "Annotations" / f"{image_id}.xml"
        try:
            yield read_voc(path, images, folder / "JPEGImages")
        except ValueError as error:
            faults.add(Fault.NO_ANNOTATION, str(path), str(error))


def _coco_files(root: Path) -> dict[str, Path]:
    """Return split -> instances file, in the order of ``SPLITS``."""
    if root.is_file():
        return {"train": root}
    files = sorted([*root.glob("annotations/*.json"), *root.glob("*.json")])
    named = [(match[2], path) for path in files if (match := COCO_NAME.fullmatch(path.stem))]
    found = dict(named)
    if len(named) == 1 or (not named and len(files) == 1):
        return {"train": named[0][1] if named else files[0]}
    if len(found) < len(named):
        names = " ".join(str(path.relative_to(root)) for _, path in named)
        raise DataError(f"several files for one split in '{root}': {names}; keep one per split")
    if "train" not in found:
        names = " ".join(str(path.relative_to(root)) for path in files) or "none"
        raise DataError(
            f"no training annotations in '{root}': expected {COCO_LAYOUT}; found {names}"
        )
    if "val" in found and "test" not in found:
        found["test"] = found.pop("val")
    return {split: found[split] for split in SPLITS if split in found}


def _coco_folder(contents: dict, path: Path) -> Path:
    """Return the folder that an instances file's images lie in.

    For instances_NAME.json it is the folder NAME, beside the file or beside its folder
    annotations, if it holds any of them; otherwise the first one there that does.
    """
    above = path.parent.parent if path.parent.name == "annotations" else path.parent
    folders = [above, *sorted(folder for folder in above.glob("*") if folder.is_dir())]
    match = COCO_NAME.fullmatch(path.stem)
    if match is not None:
        folders.insert(0, above / match[1])
    names = [image["file_name"] for image in contents["images"]]
    for folder in folders:
        if any(os.path.isfile(folder / name) for name in names):
            return folder
    raise DataError(f"no folder in '{above}' contains images of '{path}', such as '{names[0]}'")
