"""Configuration -> images: prepared shards, splits, transforms, and what models must know."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raygkd.config import DataConfig, fingerprint, owned_by
from raygkd.data import box_transforms
from raygkd.data.normalisation import channel_statistics
from raygkd.data.parquet import ImageTable, open_table
from raygkd.data.plan import shuffled
from raygkd.data.prepare import prepare
from raygkd.data.sources import Source, dataset_class, open_source
from raygkd.data.spec import ImageSpec
from raygkd.data.splits import split_rows
from raygkd.data.transforms import build_transform, default_augment
from raygkd.data.windows import Sampler, decode_rows
from raygkd.errors import ConfigError, DataError, near
from raygkd.registry import DATASETS
from raygkd.storage.atomic_files import Place, is_remote, remove_folder, write_text

Progress = Callable[[int, int], None]

# images that are looked at to learn sizes, and pixel statistics
SIZE_SAMPLE = 256
STATISTICS_SAMPLE = 2048
DEFAULT_SIZE = 224
# beside shards in an object store when all of them are there
COMPLETE = "_SUCCESS"
# of a detector's canvas, a multiple of the coarsest stride of most pyramids
LARGEST_CANVAS = 640
STRIDE = 32
# decoded bytes of a window: below Ray Data's block size, so that a window stays one block
WINDOW_BYTES = 64 << 20
MAX_WINDOW_ROWS = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class Images:
    """Everything that is known of a run's images; no pixel is held.

    Attributes:
        table: where they lie.
        rows: split -> row numbers.
        spec: classes, model input size, pixel statistics.
        augment: kind of the training transform.
        skip_bad: skip and count broken images.
        window_rows: rows that are decoded at a time.
        decoded_bytes: of all rows, as estimated from a sample.
        identity: 16 digits that stand for images, splits and input size.
    """

    table: ImageTable
    rows: dict[str, NDArray[np.int64]]
    spec: ImageSpec
    augment: str
    skip_bad: bool
    window_rows: int
    decoded_bytes: int
    identity: str

    @property
    def repeats(self) -> bool:
        """Whether a training image is the same in every epoch."""
        return self.augment == "none"

    def transform(self, split: str) -> Sampler:
        """Return what brings an image of a split to the size that the models are given."""
        return _transform(self.table, self.augment, self.spec.view[0], train=split == "train")


def open_images(
    data: DataConfig,
    *,
    seed: int,
    output: Place,
    progress: Progress | None = None,
    default_side: int = DEFAULT_SIZE,
) -> Images:
    """Open a run's images; data sets that are no shards are prepared first, once.

    Args:
        data: which images.
        seed: of the validation cut.
        output: folder that prepared shards are kept in.
        progress: is called with the images prepared and their number.
        default_side: of the student's input in pixels, where neither the settings nor the images
            say.

    Raises:
        DataError: what is wrong with the files.
        ConfigError: an unknown data set, or fractions and limits that cannot be had.
    """
    table = open_table(shards(data, output, progress))
    splits = split_rows(
        table.labels,
        table.splits,
        val_fraction=data.val_fraction,
        test_fraction=data.test_fraction,
        limit_train=data.limit_train,
        seed=seed,
    )
    rows = {"train": splits.train, "val": splits.val, "test": splits.test}
    sizes = _sizes(table, splits.train, skip_bad=data.skip_bad)
    side = data.image_size or _default_side(table, sizes, default_side)
    teacher_side = data.teacher_image_size or side
    # both models see one view; to enlarge it beyond the images would only blur it
    view = max(side, min(teacher_side, int(sizes.max())))
    augment = data.augment
    if augment == "auto":
        augment = _default_augment(table, sizes)
    mean, std = channel_statistics(
        table,
        splits.train,
        _transform(table, augment, view, train=False),
        limit=STATISTICS_SAMPLE,
        skip_bad=data.skip_bad,
    )
    largest = 3 * max(view * view, int(sizes.prod(axis=1).max()))
    return Images(
        table=table,
        rows=rows,
        spec=ImageSpec(
            class_names=table.class_names,
            image_size=(side, side),
            mean=mean,
            std=std,
            task=table.task,
            score=_score(table, data.score),
            augment=augment,
            teacher_size=(teacher_side, teacher_side),
            view_size=(view, view),
        ),
        augment=augment,
        skip_bad=data.skip_bad,
        window_rows=int(np.clip(WINDOW_BYTES // largest, 1, MAX_WINDOW_ROWS)),
        decoded_bytes=int(3 * sizes.prod(axis=1).mean() * sum(map(len, rows.values()))),
        identity=fingerprint(
            [table.fingerprint(), view, *(rows[split].tolist() for split in sorted(rows))]
        ),
    )


def task_of(dataset: str) -> str | None:
    """Return a data set's task; None if its name does not determine it, as for parquet."""
    return dataset_class(dataset).task


def _is_uniform(sizes: NDArray[np.int64]) -> bool:
    return len(np.unique(sizes, axis=0)) == 1


def _default_side(table: ImageTable, sizes: NDArray[np.int64], otherwise: int) -> int:
    """Return the side of the model input: the images' own where one side suits them all."""
    if table.boxes is not None:
        longest = int(np.ceil(sizes.max() / STRIDE)) * STRIDE
        return min(longest, LARGEST_CANVAS)
    return int(sizes[0].max()) if _is_uniform(sizes) else otherwise


def _default_augment(table: ImageTable, sizes: NDArray[np.int64]) -> str:
    suited = dataset_class(table.dataset).augment
    if suited is not None:
        return suited
    return default_augment(_is_uniform(sizes)) if table.boxes is None else "jitter-flip"


def _transform(table: ImageTable, augment: str, side: int, *, train: bool) -> Sampler:
    if table.boxes is None:
        return build_transform(augment, side, train=train)
    most = table.boxes.most
    return box_transforms.build_box_transform(augment, side, train=train, most=most)


def _score(table: ImageTable, wanted: str) -> str:
    """Return what models are ranked by."""
    if table.boxes is None:
        return "accuracy"
    if wanted == "auto":
        return dataset_class(table.dataset).score
    return wanted


def shards(data: DataConfig, output: Place, progress: Progress | None = None) -> str:
    """Return the path of a data set's Parquet shards, preparing them in ``output`` if need be."""
    known = [*DATASETS.names(), "parquet"]
    if data.dataset not in known:
        raise ConfigError(
            f"--dataset {data.dataset!r}: unknown{near(data.dataset, known)} "
            f"(known: {', '.join(known)})"
        )
    if data.dataset == "parquet":
        if data.data_dir is None:
            raise ConfigError("--dataset parquet needs --data-dir: a .parquet file or a folder")
        return data.data_dir
    source = open_source(
        data.dataset,
        data.data_dir,
        data.download,
        strict=data.strict,
        years=tuple(map(str, data.years)),
        classes=data.classes,
        own=owned_by(data.dataset, data.own),
    )
    folder = output / "data" / f"{data.dataset}-{_source_identity(source, data.skip_bad)}"
    # a local folder appears when it is complete; in an object store its shards do, one by one
    complete = folder / COMPLETE if is_remote(folder) else folder
    if not complete.exists():
        remove_folder(folder)
        prepare(source, str(folder), skip_bad=data.skip_bad, progress=progress)
        if is_remote(folder):
            write_text(complete, "")
    return str(folder)


def _source_identity(source: Source, skip_bad: bool) -> str:
    """Return a hash that changes when a file is added, removed, or written again."""
    facts = []
    for sample in source.samples:
        stat = os.stat(sample.origin) if os.path.exists(sample.origin) else None
        place = [stat.st_size, stat.st_mtime_ns] if stat else []
        known = [] if sample.boxes is None else vars(sample.boxes).values()
        objects = [part.tolist() for part in known]
        facts.append([sample.origin, sample.label, sample.split, *objects, *place])
    return fingerprint([list(source.class_names), skip_bad, facts])


def _sizes(table: ImageTable, rows: NDArray[np.int64], *, skip_bad: bool) -> NDArray[np.int64]:
    """Return height and width of some training images, which few row groups hold (images, 2)."""
    sample = shuffled(rows, table.units.first, seed=0)[:SIZE_SAMPLE]
    decoded = decode_rows(table, sample, skip_bad=skip_bad)
    sizes = [image_CHW.shape[1:] for image_CHW in decoded if image_CHW is not None]
    if not sizes:
        raise DataError(f"none of {len(sample)} sampled images of '{table.path}' can be decoded")
    return np.array(sizes)
