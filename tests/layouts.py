"""Small data sets in the layouts and formats that raygkd reads."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = (40, 30)
"""Width and height of the images, unless told otherwise."""


def write_image(path: Path, size: tuple[int, int] = SIZE, orientation: int = 1) -> None:
    """Write random, smooth pixels; the format is that of the file's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(len(path.name)).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path, exif=exif)


def write_xml(
    path: Path, file_name: str, objects: Sequence[tuple], size: tuple[int, int] | None = SIZE
) -> None:
    """Write an annotation; an object is (name, xmin, ymin, xmax, ymax[, difficult])."""
    size_tag = "<size><width>{}</width><height>{}</height></size>".format(*size) if size else ""
    tags = "".join(
        f"<object><name>{name}</name><difficult>{int(bool(difficult))}</difficult>"
        f"<bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox>"
        "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax>"
        "</bndbox></part></object>"
        for name, x0, y0, x1, y1, *difficult in objects
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"<annotation><filename>{file_name}</filename>{size_tag}{tags}</annotation>",
        encoding="utf-8",
    )


def write_voc(
    folder: Path,
    images: Mapping[str, Sequence[tuple]],
    lists: Mapping[str, Sequence[str]] | None = None,
) -> Path:
    """Write a folder in VOC layout.

    Args:
        folder: where.
        images: image id -> objects.
        lists: name of each list in ImageSets/Main -> image ids.
    """
    for image_id, objects in images.items():
        write_image(folder / "JPEGImages" / f"{image_id}.jpg")
        write_xml(folder / "Annotations" / f"{image_id}.xml", f"{image_id}.jpg", objects)
    for name, image_ids in (lists or {}).items():
        path = folder / "ImageSets" / "Main" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{image_id}\n" for image_id in image_ids))
    return folder


def coco_contents(
    images: Mapping[str, Sequence[tuple]],
    names: Mapping[int, str],
    *,
    first_id: int = 1,
) -> dict[str, Any]:
    """Return what an instances file holds.

    Args:
        images: file name -> objects, (category id, x, y, width, height[, crowd]).
        names: category id -> class name.
        first_id: id of the first image; the others follow.
    """
    ids = dict(zip(images, range(first_id, first_id + len(images))))
    boxes = [
        {"image_id": ids[file_name], "category_id": key, "bbox": bbox[:4], "iscrowd": sum(bbox[4:])}
        | {"segmentation": [[0, 0, 1, 1, 0, 1]], "area": 1}
        for file_name, objects in images.items()
        for key, *bbox in objects
    ]
    return {
        "images": [
            {"id": key, "file_name": file_name, "width": SIZE[0], "height": SIZE[1]}
            for file_name, key in ids.items()
        ],
        "annotations": [box | {"id": 100 + number} for number, box in enumerate(boxes)],
        "categories": [{"id": key, "name": name} for key, name in names.items()],
    }


def write_coco(path: Path, folder: Path, contents: Mapping[str, Any]) -> None:
    """Write an instances file and its images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contents))
    for image in contents["images"]:
        write_image(folder / image["file_name"])


def write_yolo(
    root: Path, splits: Mapping[str, Mapping[str, str | None]], names: Sequence[str]
) -> Path:
    """Write a data set in YOLO's format.

    Args:
        root: where.
        splits: split -> image's name -> contents of its label file; None writes none.
        names: names of the classes.
    """
    for split, images in splits.items():
        for name, lines in images.items():
            write_image(root / "images" / split / f"{name}.jpg")
            if lines is not None:
                path = root / "labels" / split / f"{name}.txt"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(lines)
    keys = "".join(f"{split}: images/{split}\n" for split in splits)
    (root / "data.yaml").write_text(f"{keys}names: {json.dumps(list(names))}\n")
    return root


def write_table(path: Path, rows: Sequence[Sequence[Any]], folder: str = "") -> Path:
    """Write a table and the images of its first column; return its folder.

    Args:
        path: the file; its suffix determines the delimiter.
        rows: the header, then the rows.
        folder: folder of the images, from that of the table.
    """
    delimiter = "\t" if path.suffix == ".tsv" else ","
    for name, *_ in rows[1:]:
        write_image(path.parent / folder / str(name))
    path.write_text("".join(delimiter.join(map(str, row)) + "\n" for row in rows))
    return path.parent


def encode_image(seed: int = 0, size: tuple[int, int] = (12, 12), kind: str = "PNG") -> bytes:
    """Return an encoded image of (width, height) random, smooth pixels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    """Write a tar file of members; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def tar_members(*labels: str, first: int = 0) -> dict[str, bytes]:
    """Return PNG images with labels as text."""
    found = {}
    for number, label in enumerate(labels, start=first):
        found |= {f"{number:04}.png": encode_image(number), f"{number:04}.cls": label.encode()}
    return found
