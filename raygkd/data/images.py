"""Images that a Python program has as torch or Ray data sets, written as a prepared folder.

Shapes: C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
from numpy.typing import NDArray
from PIL import Image

from raygkd.data.decoding import decode
from raygkd.data.prepare import ORDER_SEED, SHARD_BYTES
from raygkd.data.seeds import generator
from raygkd.data.shard_writer import ShardWriter
from raygkd.data.sources import Sample, Source
from raygkd.data.splits import NO_LABEL, SPLITS
from raygkd.errors import DataError
from raygkd.storage.temporary import remove_left_folders, temporary_folder

PIXEL = "an image must be a PIL image, encoded bytes, or (3, H, W) or (H, W, 3) pixels"


@dataclass(frozen=True, kw_only=True)
class Images:
    """Labelled images for ``raygkd.train``, ``raygkd.tune`` and ``raygkd.compare``.

    A data set is a torch data set or another iterable of (image, label), or a Ray Dataset or
    another iterable of rows with the keys "image" and "label". An image is a PIL image, its
    encoded bytes, or an array or tensor (3, H, W), (H, W, 3) or (H, W) of uint8, or of floats in
    0..1; give it as it is, before augmentation and normalisation. A label is the number of a class
    or its name; None, in ``train``, means that there is none.

    >>> import raygkd, torchvision  # doctest: +SKIP
    >>> photos = torchvision.datasets.ImageFolder("photos")  # doctest: +SKIP
    >>> raygkd.tune(data=raygkd.Images(train=photos), trials=16)  # doctest: +SKIP

    Attributes:
        train: images to train on.
        val: images that choose between settings; None to hold out some of ``train``.
        test: images that are scored once, at the end; None to hold out some of ``train``.
        class_names: name of each class; None for the attribute ``classes`` of ``train``.
    """

    train: Iterable[Any]
    val: Iterable[Any] | None = None
    test: Iterable[Any] | None = None
    class_names: Sequence[str] | None = None


def write_images(
    images: Images, parent: Path, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Write images as Parquet shards; return their folder, which is named after their contents.

    Every data set is read once. One whose items have numbers is read in a shuffled order, as is a
    Ray Dataset; any other iterable is read as it comes.

    Args:
        images: the data sets.
        parent: folder that gets a folder of the shards, if it does not have it yet.
        progress: called with the number of images written and the total, as
            far as it is known.

    Raises:
        DataError: there are no class names, or an item is not an image with a label.
    """
    names = _class_names(images)
    source = Source("images", names, ())
    parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(repr(names).encode())
    ordered = {split: _ordered(getattr(images, split)) for split in SPLITS}
    total = sum(length for length, _ in ordered.values())
    remove_left_folders(parent)
    with (
        temporary_folder("images", parent=parent) as folder,
        ShardWriter(pyarrow.fs.LocalFileSystem(), str(folder), source, SHARD_BYTES, []) as out,
    ):
        for done, (split, place, item) in enumerate(_items(ordered), start=1):
            encoded, label = _checked(item, place, split, names)
            digest.update(f"{split} {label} ".encode() + encoded)
            out.add(Sample(label, split, place, bytes), encoded)
            if progress is not None:
                progress(done, max(done, total))
        if not out.has_images:
            raise DataError("data: train has no images")
        out.finish()
        whole = parent / f"{digest.hexdigest()[:16]}-images"
        if not whole.is_dir():
            folder.rename(whole)
    return whole


def _class_names(images: Images) -> tuple[str, ...]:
    names: Any = images.class_names
    owner: Any = images.train
    while names is None and owner is not None:
        # random_split and Subset hold the data set that knows its classes
        names, owner = getattr(owner, "classes", None), getattr(owner, "dataset", None)
    if not names or isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise DataError(
            f"data: class_names is {names!r:.60}; pass the name of each class, such as "
            "Images(..., class_names=['cat', 'dog'])"
        )
    if len(set(names)) < len(names):
        raise DataError("data: class_names has a name twice; give each class a name of its own")
    return tuple(names)


def _ordered(dataset: Any) -> tuple[int, Iterable[tuple[int, Any]]]:
    """Return the length of a data set, 0 if unknown, and its numbered items."""
    if dataset is None:
        return 0, ()
    if hasattr(dataset, "iter_rows"):
        shuffled = dataset.random_shuffle(seed=ORDER_SEED).materialize()
        return shuffled.count(), enumerate(shuffled.iter_rows())
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        order = generator(ORDER_SEED).permutation(len(dataset)).tolist()
        return len(dataset), ((index, dataset[index]) for index in order)
    return 0, enumerate(dataset)


def _items(
    ordered: Mapping[str, tuple[int, Iterable[tuple[int, Any]]]],
) -> Iterator[tuple[str, str, Any]]:
    """Yield the split, the place for messages, and the item, of every image."""
    for split, (_, numbered) in ordered.items():
        number = 0
        try:
            for index, item in numbered:
                yield split, f"{split}[{index}]", item
                number += 1
        except Exception as error:
            error.add_note(f"raygkd was reading image {number} (from 0) of {split}")
            raise


def _checked(item: Any, place: str, split: str, names: tuple[str, ...]) -> tuple[bytes, int]:
    """Return the encoded image and the label of an item."""
    if isinstance(item, Mapping) and {"image", "label"} <= item.keys():
        image, label = item["image"], item["label"]
    elif isinstance(item, tuple | list) and len(item) == 2:
        image, label = item
    else:
        raise DataError(
            f"data: {place} is a {type(item).__name__}; it must be (image, label), or a mapping "
            "with the keys 'image' and 'label'"
        )
    return _encoded(image, place), _label(label, place, split, names)


def _label(label: Any, place: str, split: str, names: tuple[str, ...]) -> int:
    if label is None and split == "train":
        return NO_LABEL
    if isinstance(label, str) and label in names:
        return names.index(label)
    array = np.asarray(label)
    if array.shape in ((), (1,)) and array.dtype.kind in "iu" and 0 <= array.item() < len(names):
        return int(array.item())
    raise DataError(
        f"data: {place}: label {label!r:.60} (allowed: 0 to {len(names) - 1}, or the name of a "
        "class); boxes and several labels need a data set in files, see 'raygkd data prepare'"
    )


def _encoded(image: Any, place: str) -> bytes:
    if isinstance(image, bytes):
        try:
            decode(image)
        except ValueError as error:
            raise DataError(f"data: {place}: {error}; leave the image out") from error
        return image
    if not isinstance(image, Image.Image):
        image = Image.fromarray(_pixels(np.asarray(image), place))
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def _pixels(array: NDArray[Any], place: str) -> NDArray[np.uint8]:
    """Return an image's pixels, (H, W, 3) or (H, W)."""
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[-1] not in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.size == 0 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] != 3):
        raise DataError(f"data: {place}: {PIXEL}, but has the shape {array.shape}")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    low, high = (float(array.min()), float(array.max())) if array.dtype.kind == "f" else (0, 256)
    if not 0 <= low <= high <= 1:  # also if one is NaN
        raise DataError(
            f"data: {place}: {PIXEL} as uint8 or as floats in 0..1, but is {array.dtype} from "
            f"{low:g} to {high:g}; pass images before they are normalised"
            if array.dtype.kind == "f"
            else f"data: {place}: {PIXEL} as uint8 or as floats in 0..1, but is {array.dtype}"
        )
    return np.ascontiguousarray((array * 255).round().astype(np.uint8))
