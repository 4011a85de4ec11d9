"""Folders of images, one for each class."""

from __future__ import annotations

from pathlib import Path

from raygkd.data.faults import Fault, Faults, report_class_names
from raygkd.data.image_files import (
    has_images,
    image_files,
    known_suffixes,
    read_of,
    split_folders,
    subfolders,
)
from raygkd.data.sources import DataSet, Sample, Source, SourceOptions, existing_folder
from raygkd.data.splits import SPLITS, split_named
from raygkd.errors import DataError
from raygkd.registry import DATASETS


@DATASETS.register("imagefolder")
class ImageFolder(DataSet):
    """A folder of images per class."""

    task = "classification"
    is_general = True

    @classmethod
    def recognise(cls, root: Path) -> str | None:
        """Return "folders a, b, ..." for a folder with folders that have images."""
        folders = subfolders(root) if root.is_dir() else []
        if not any(map(has_images, folders)):
            return None
        more = ", ..." if len(folders) > 3 else ""
        return f"folders {', '.join(folder.name for folder in folders[:3])}{more}"

    def open(self, options: SourceOptions) -> Source:
        """Return the images of the tree; folders named after splits may be above the classes."""
        root = existing_folder("imagefolder", options)
        faults = Faults(options.strict)
        labels: dict[str, int] = {}
        samples: list[Sample] = []
        for split, parent in _class_parents(root, faults).items():
            files = {folder.name: image_files(folder, faults) for folder in subfolders(parent)}
            if split == "train":
                labels = {name: label for label, name in enumerate(files)}
            _check_tree(parent, files, labels)
            samples += (
                Sample(labels[name], split, str(path), read_of(path))
                for name, paths in files.items()
                for path in paths
            )
        report_class_names(labels, str(root), faults)
        for name in labels:
            if split_named(name) is not None:
                faults.add(Fault.SPLIT_CLASS, str(root), repr(name))
        return Source("imagefolder", tuple(labels), samples, faults.warnings())


def _class_parents(root: Path, faults: Faults) -> dict[str, Path]:
    """Return split -> parent of the class folders; "train" -> ``root`` without split folders."""
    folders = subfolders(root)
    # a folder "train" without subfolders is a class of that name
    deep = {split_named(folder.name): folder for folder in folders if subfolders(folder)}
    if "train" not in deep:
        _refuse_other_levels(root, folders)
        return {"train": root}
    found = split_folders(root)
    for folder in folders:
        if split_named(folder.name) is None:
            faults.add(Fault.OTHER_FOLDER, str(folder))
    return {split: found[split] for split in SPLITS if split in found}


def _refuse_other_levels(root: Path, folders: list[Path]) -> None:
    """Raise DataError if the classes seem to be above or below the folders next to the root."""
    inner = {folder: subfolders(folder) for folder in folders}
    names = [folder.name for folder in folders]
    if folders and all(map(split_named, names)) and any(inner.values()):
        raise DataError(
            f"'{root}' has the splits {' and '.join(names)} but no folder for training; add one "
            "named train"
        )
    below = [folder.name for folders in inner.values() for folder in folders]
    if below and all(inner.values()) and all(map(split_named, below)):
        remedy = "put the classes into the splits, as in train/cat"
        if len(folders) == 1:
            remedy = f"set --data-dir to '{folders[0]}'"
        raise DataError(
            f"'{root}' has the splits {' and '.join(dict.fromkeys(below))} below its folder "
            f"{names[0]}; {remedy}"
        )
    if len(folders) == 1 and len(below) > 1 and not _has_direct_images(folders[0]):
        raise DataError(
            f"'{root}' has a single class folder, whose folders {', '.join(below[:5])} may be the "
            f"classes; set --data-dir to '{folders[0]}'"
        )


def _has_direct_images(folder: Path) -> bool:
    return any(path.parent == folder for path in image_files(folder))


def _check_tree(parent: Path, files: dict[str, list[Path]], labels: dict[str, int]) -> None:
    if not files:
        raise DataError(f"no class folders in '{parent}'; put each class's images in a folder")
    if not any(files.values()):
        raise DataError(f"no images in the class folders of '{parent}' ({known_suffixes()})")
    for name, paths in files.items():
        if not paths:
            raise DataError(
                f"class '{name}' has no images in '{parent / name}' ({known_suffixes()}); add some "
                "or remove the folder"
            )
        if name not in labels:
            raise DataError(
                f"class '{name}' of '{parent}' is not among the training classes; add it to the "
                "train folder or remove it"
            )
