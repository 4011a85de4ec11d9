"""Pascal VOC, and folders in its layout."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path, PureWindowsPath
from xml.etree import ElementTree

import numpy as np

from raygkd.data.annotations import (
    PHOTOGRAPHS,
    Annotation,
    annotated_size,
    detection_source,
    four_numbers,
    unread_texts,
)
from raygkd.data.faults import Fault, Faults
from raygkd.data.image_files import image_suffixes
from raygkd.data.sources import (
    VOC_YEARS,
    DataSet,
    Source,
    SourceOptions,
    existing_folder,
    needed_folder,
)
from raygkd.data.splits import SPLITS, split_named
from raygkd.errors import ConfigError, DataError
from raygkd.registry import DATASETS
from raygkd.storage.reading import read_bytes, read_text

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
VOC_LAYOUT = (
    "the folders JPEGImages and Annotations, there or below VOCdevkit, or .xml files next to images"
)
# names of the folders of annotations and of images, in any case
FOLDER_NAMES = ("annotations", "xml"), ("jpegimages", "images")
DECLARED_ENCODING = re.compile(r"""^\s*<\?xml[^>]*?encoding\s*=\s*["']([\w.:-]+)["']""")
# encodings that are declared for text in a larger one
SUPERSETS = {
    "gb2312": "gb18030", "gbk": "gb18030", "big5": "big5hkscs", "shift_jis": "cp932",
    "euc_kr": "cp949", "ascii": "utf-8",
}  # fmt: skip
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
VOC_FOLDERS = [f"VOC{year}" for year in VOC_YEARS]
VocPart = tuple[str, Path, list[str]]
"""Split, folder in VOC layout, and ids of the images of that folder."""


@DATASETS.register("voc")
class Voc(DataSet):
    """Pascal VOC, or any folder in its layout, see ``read_voc_folder``."""

    task = "detection"
    can_fetch = True
    recipe = PHOTOGRAPHS

    @classmethod
    def recognise(cls, root: Path) -> str | None:
        """Return the folder of the annotations."""
        folders = _voc_folders(root) if root.is_dir() else []
        return next((f"{_places(folder)[0].name}/*.xml" for folder in folders), None)

    def open(self, options: SourceOptions) -> Source:
        """Return the images with their boxes."""
        return read_voc_folder(options)


def read_voc_folder(options: SourceOptions) -> Source:
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
    return detection_source("voc", root, class_names, annotated, faults)


def read_voc(path: Path, images: Mapping[str, Path], folder: Path) -> Annotation:
    """Read one annotation in Pascal VOC's XML.

    VOC counts pixels from 1 and stores the first and last pixel of a box, so the sides of a box
    (xmin, ymin, xmax, ymax) are (xmin - 1, ymin - 1, xmax, ymax).

    Args:
        path: the XML file; its stem is the image's id.
        images: image files by file name and by stem; the name in the XML is looked up first,
            then the id.
        folder: folder of the image if ``images`` has neither.

    Raises:
        ValueError: the file cannot be read or is not XML.
    """
    try:
        root = ElementTree.fromstring(_xml_text(read_bytes(path)))
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    # an encoding unknown to Python raises LookupError
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise ValueError(f"not XML: {error}") from error
    # some programs write the full path, of any operating system
    file_name = PureWindowsPath(root.findtext("filename", "").strip()).name
    objects = root.findall("object")
    texts = [
        [box.findtext(f"bndbox/{side}", "").strip() for side in ("xmin", "ymin", "xmax", "ymax")]
        for box in objects
    ]
    corners = [four_numbers(sides) for sides in texts]
    return Annotation(
        place=str(path),
        image_id=path.stem,
        image=images.get(file_name) or images.get(path.stem) or folder / (file_name or path.stem),
        size=annotated_size(root.findtext("size/width"), root.findtext("size/height")),
        marks=[f"object {number}" for number in range(1, len(objects) + 1)],
        names=[box.findtext("name", "").strip() for box in objects],
        xyxy=np.array(corners).reshape(-1, 4) - [1, 1, 0, 0],
        unread=unread_texts(texts, corners),
        difficult=np.array([box.findtext("difficult", "").strip() == "1" for box in objects], bool),
        crowd=np.zeros(len(objects), bool),
    )


def _xml_text(content: bytes) -> str:
    """Return XML as text, in the encoding that it declares.

    Expat, which parses XML, has no encodings with several bytes per character besides Unicode's.
    """
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if content.startswith(mark):
            return content.decode(encoding)
    if b"\0" in content[:4]:
        return content.decode("utf-16-be" if content[:1] == b"\0" else "utf-16-le")
    declared = DECLARED_ENCODING.match(content[:200].decode("latin-1"))
    encoding = codecs.lookup(declared[1] if declared else "utf-8").name
    # text that begins with one byte per character is in neither of these
    encoding = "utf-8" if encoding.startswith(("utf-16", "utf-32")) else encoding
    return content.decode(SUPERSETS.get(encoding, encoding))


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
        raise ConfigError(f"--years {','.join(years)!r}: must be {', '.join(VOC_YEARS)}, or both")


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
    of_split = {split_named(folder.name) or "": folder for folder in folders}
    if "train" in of_split and "" not in of_split and len(of_split) == len(folders):
        return [(s, of_split[s], _all_ids(of_split[s])) for s in SPLITS if s in of_split]
    if len(folders) > 1:
        names = " and ".join(f"'{folder}'" for folder in folders)
        raise DataError(f"{names} are separate data sets; set --data-dir to one of them")
    return _own_parts(folders[0])


def _voc_folders(root: Path) -> list[Path]:
    """Return the folder in VOC layout, or those next below, with or without VOCdevkit."""

    for above in (root, root / "VOCdevkit"):
        if _places(above):
            return [above]
        found = [folder for folder in above.glob("*") if folder.is_dir() and _places(folder)]
        if found:
            return sorted(found)
    return []


def _places(folder: Path) -> tuple[Path, ...]:
    """Return the folders of annotations and of images of a folder in VOC layout; else ()."""
    if not folder.is_dir():
        return ()
    # a folder of images may have a million files
    with os.scandir(folder) as entries:
        paths = {entry.name.lower(): folder / entry.name for entry in entries}
    # unlike the entries, paths take a loop of links for no folder
    inner = {name: path for name, path in paths.items() if path.is_dir()}
    found = [[inner[name] for name in names if name in inner] for names in FOLDER_NAMES]
    if all(found):
        annotations, images = found[0][0], found[1][0]
        is_voc = (annotations.name, images.name) == ("Annotations", "JPEGImages")
        # COCO has folders of these names too, with .json files
        if is_voc or any(annotations.glob("*.xml")):
            return annotations, images
    return (folder, folder) if any(folder.glob("*.xml")) and _images_in(folder) else ()


def _year_parts(root: Path, folders: dict[str, Path], years: tuple[str, ...]) -> list[VocPart]:
    parts: list[VocPart] = []
    for year in dict.fromkeys(years):
        if year not in folders:
            raise DataError(
                f"no VOC{year} in '{root}'; pass --download, or train on --years "
                f"{','.join(folders)}"
            )
        lists = _image_sets(folders[year])
        if "trainval" not in lists:
            raise DataError(
                f"no ImageSets/Main/trainval.txt in '{folders[year]}'; if that is your own data "
                "set, set --data-dir to it"
            )
        parts.append(("train", folders[year], _listed(lists["trainval"], folders[year])))
    lists = _image_sets(folders["2007"]) if "2007" in folders else {}
    if "test" in lists:
        parts.append(("test", folders["2007"], _listed(lists["test"], folders["2007"])))
    return parts


def _own_parts(folder: Path) -> list[VocPart]:
    lists = _image_sets(folder)
    if not lists:
        return [("train", folder, _all_ids(folder))]
    names = {split: name for name in lists if (split := split_named(name)) is not None}
    if "train" not in names and "trainval" in lists:
        names = {"train": "trainval"} | {s: name for s, name in names.items() if s == "test"}
    if "train" not in names:
        raise DataError(
            f"no train.txt or trainval.txt in '{folder}/ImageSets/Main'; add one, or remove "
            "ImageSets to train on all images"
        )
    splits = [split for split in SPLITS if split in names]
    return [(split, folder, _listed(lists[names[split]], folder)) for split in splits]


def _all_ids(folder: Path) -> list[str]:
    annotations, images = _places(folder)
    return sorted({path.stem for path in (*annotations.glob("*.xml"), *_images_in(images))})


def _image_sets(folder: Path) -> dict[str, Path]:
    """Return the lists of image ids of a folder in VOC layout, by name."""
    return {path.stem: path for path in folder.glob("ImageSets/Main/*.txt")}


def _listed(path: Path, folder: Path) -> list[str]:
    """Return the image ids of a list, in the folder's spelling.

    Lines may have further columns, comments after ``#``, and paths and suffixes of the images.
    """
    try:
        lines = read_text(path).splitlines()
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}") from error
    known = set(_all_ids(folder))
    image_ids = [_image_id(line, known) for line in lines if line.partition("#")[0].strip()]
    if not image_ids:
        raise DataError(f"'{path}' lists no image: fill it or remove it")
    return image_ids


def _image_id(line: str, known: Set[str]) -> str:
    """Return the id that a line of a list names; its first column if it is not known."""
    text = line.partition("#")[0].strip()
    first = re.split(r"[\s,;]", text)[0]
    for candidate in (line.strip(), text, first):
        file_name = PureWindowsPath(candidate).name
        for image_id in (candidate, file_name, PureWindowsPath(file_name).stem):
            if image_id in known:
                return image_id
    return first


def _images_in(folder: Path) -> list[Path]:
    suffixes = image_suffixes()
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)


def _voc_annotations(
    folder: Path, image_ids: Iterable[str], faults: Faults
) -> Iterator[Annotation]:
    annotations, parent = _places(folder)
    files = _images_in(parent)
    images = {path.stem: path for path in files} | {path.name: path for path in files}
    for image_id in image_ids:
        path = annotations / f"{image_id}.xml"
        try:
            yield read_voc(path, images, parent)
        except ValueError as error:
            faults.add(Fault.NO_ANNOTATION, str(path), str(error))
