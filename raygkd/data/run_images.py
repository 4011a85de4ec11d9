"""The images of a configuration: prepared shards, splits, transforms, and their spec."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from raygkd.config import DataConfig, fingerprint, owned_by
from raygkd.data import box_transforms
from raygkd.data.normalisation import channel_statistics
from raygkd.data.parquet import ImageTable, open_table
from raygkd.data.plan import shuffled
from raygkd.data.prepare import prepare
from raygkd.data.recognition import holds_parquet
from raygkd.data.shard_writer import source_identity
from raygkd.data.sources import check_dataset, dataset_class, open_source
from raygkd.data.spec import ImageSpec
from raygkd.data.splits import NO_LABEL, Splits, hold_out, split_rows
from raygkd.data.transforms import build_transform, default_augment
from raygkd.data.unlabelled import (
    UNLABELLED,
    check_exists,
    check_folder,
    joined,
    lacks_labels,
    without_labels,
)
from raygkd.data.views import UNCHANGED, Views
from raygkd.data.windows import Sampler, decode_rows
from raygkd.errors import DataError
from raygkd.metrics.ranking import check_score
from raygkd.registry import entry_name
from raygkd.storage.atomic_files import Place, is_remote, remove_folder, write_text

Progress = Callable[[int, int], None]

_log = logging.getLogger("raygkd.data")

# number of images from which sizes and pixel statistics are estimated
SIZE_SAMPLE = 256
STATISTICS_SAMPLE = 2048
DEFAULT_SIZE = 224
# largest class / smallest class from which on imbalance is reported, and the scores that weigh all
# classes equally
IMBALANCE = 10
BALANCED = ("balanced-accuracy", "macro-f1")
# file that marks complete shards in an object store
COMPLETE = "_SUCCESS"
# largest default side of a detector's canvas; a multiple of the coarsest stride of most pyramids
LARGEST_CANVAS = 640
STRIDE = 32
# decoded size of a window, below Ray Data's block size, so that a window is one block
WINDOW_BYTES = 64 << 20
MAX_WINDOW_ROWS = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class Images:
    """The images of a run, without their pixels.

    Attributes:
        table: table of the images.
        rows: split -> row numbers; "unlabelled" has the training images without labels, if any.
        spec: classes, model input size, pixel statistics.
        augment: kind of the training transform.
        skip_bad: whether to skip and count unreadable images.
        window_rows: number of rows decoded at a time.
        decoded_bytes: decoded size of all rows, estimated from a sample.
        identity: hash of images, splits and input size, 16 digits.
        evaluates: training images are transformed as for evaluation.
    """

    table: ImageTable
    rows: dict[str, NDArray[np.int64]]
    spec: ImageSpec
    augment: str
    skip_bad: bool
    window_rows: int
    decoded_bytes: int
    identity: str
    evaluates: bool = False

    @property
    def repeats(self) -> bool:
        """Whether ``augment`` leaves a training image the same in every epoch."""
        return self.augment == "none"

    def transform(self, split: str, views: Views = UNCHANGED) -> Sampler:
        """Return the transform of the images of a split, to the size that both models get.

        Args:
            split: "train", "val" or "test".
            views: changes of training images after their crop; none for detection.
        """
        train = split == "train" and not self.evaluates
        return _transform(self.table, self.augment, self.spec.view[0], train=train, views=views)


def open_images(
    data: DataConfig,
    *,
    seed: int,
    output: Place,
    progress: Progress | None = None,
    default_side: int = DEFAULT_SIZE,
    class_names: tuple[str, ...] = (),
) -> Images:
    """Open a run's images; data sets that are not shards are prepared first, once.

    Args:
        data: settings of the data set.
        seed: seed of the splits.
        output: folder for prepared shards.
        progress: called with the number of prepared images and the total.
        default_side: side of the student's input in pixels, if neither the settings nor the images
            determine it.
        class_names: classes of the student, if no image has a label.

    Raises:
        DataError: files are missing or invalid.
        ConfigError: the data set is unknown, or fractions or limits are out of range.
    """
    table = _table(data, output, progress)
    _report_warnings(table, strict=data.strict)
    splits = _splits(table, data, seed)
    rows = {"train": splits.train, "val": splits.val, "test": splits.test}
    if len(splits.unlabelled):
        rows["unlabelled"] = splits.unlabelled
    every = np.concatenate([splits.train, splits.unlabelled])
    sizes = own_sizes = _sizes(table, every, skip_bad=data.skip_bad)
    if len(splits.train) and len(splits.unlabelled):
        own_sizes = _sizes(table, splits.train, skip_bad=data.skip_bad)
    side = data.image_size or _default_side(table, own_sizes, default_side)
    teacher_side = data.teacher_image_size or side
    # both models see one view; to enlarge it beyond the images would only blur it
    view = max(side, min(teacher_side, int(sizes.max())))
    augment = data.augment
    if augment == "auto":
        augment = _default_augment(table, sizes)
    mean, std = channel_statistics(
        table,
        every,
        _transform(table, augment, view, train=False),
        limit=STATISTICS_SAMPLE,
        skip_bad=data.skip_bad,
    )
    largest = 3 * max(view * view, int(sizes.prod(axis=1).max()))
    return Images(
        table=table,
        rows=rows,
        spec=ImageSpec(
            class_names=table.class_names or class_names,
            image_size=(side, side),
            mean=mean,
            std=std,
            task=table.task,
            score=_score(table, data),
            augment=augment,
            teacher_size=(teacher_side, teacher_side),
            view_size=(view, view),
            class_counts=_class_counts(table, splits.train),
            unlabelled=len(splits.unlabelled),
        ),
        augment=augment,
        skip_bad=data.skip_bad,
        window_rows=int(np.clip(WINDOW_BYTES // largest, 1, MAX_WINDOW_ROWS)),
        decoded_bytes=int(3 * sizes.prod(axis=1).mean() * sum(map(len, rows.values()))),
        identity=fingerprint(
            [table.fingerprint(), view, *(rows[split].tolist() for split in sorted(rows))]
        ),
    )


def _table(data: DataConfig, output: Place, progress: Progress | None) -> ImageTable:
    """Return the table of a run's images, those without labels after the others.

    Raises:
        DataError: files are missing or invalid, or no image of a labelled set has a label.
    """
    table = open_table(shards(data, output, progress))
    if lacks_labels(data.dataset):
        return without_labels(table)
    if table.boxes is None and not (table.labels != NO_LABEL).any():
        raise DataError(
            f"'{table.path}' has no labels; add a column label (integer), or train without labels "
            f"with --unlabelled {table.path}"
        )
    if data.unlabelled is not None:
        check_exists(data.unlabelled)
        alone = replace(data, dataset=UNLABELLED, data_dir=data.unlabelled, own={})
        others = open_table(shards(alone, output, progress))
        table = joined(table, without_labels(others))
    return table


def _splits(table: ImageTable, data: DataConfig, seed: int) -> Splits:
    if lacks_labels(data.dataset):
        return hold_out(
            table.splits, val_fraction=data.val_fraction, limit_train=data.limit_train, seed=seed
        )
    return split_rows(
        table.labels,
        table.splits,
        val_fraction=data.val_fraction,
        test_fraction=data.test_fraction,
        limit_train=data.limit_train,
        seed=seed,
    )


def _report_warnings(table: ImageTable, *, strict: bool) -> None:
    """Log the faults that were found when a table was prepared, or raise DataError."""
    for warning in table.warnings:
        if strict:
            raise DataError(f"'{table.path}': {warning}; correct it, or omit --strict")
        _log.warning(warning)


def task_of(dataset: str) -> str | None:
    """Return a data set's task; None if its name does not determine it, as for parquet."""
    return dataset_class(dataset).task


def _is_uniform(sizes: NDArray[np.int64]) -> bool:
    return len(np.unique(sizes, axis=0)) == 1


def _default_side(table: ImageTable, sizes: NDArray[np.int64], otherwise: int) -> int:
    """Return the default side of the model input, which is the images' own if they agree."""
    if table.boxes is not None:
        longest = int(np.ceil(sizes.max() / STRIDE)) * STRIDE
        return min(longest, LARGEST_CANVAS)
    return int(sizes[0].max()) if _is_uniform(sizes) else otherwise


def _default_augment(table: ImageTable, sizes: NDArray[np.int64]) -> str:
    augment = dataset_class(table.dataset).augment
    if augment is not None:
        return augment
    return default_augment(_is_uniform(sizes)) if table.boxes is None else "jitter-flip"


def _transform(
    table: ImageTable, augment: str, side: int, *, train: bool, views: Views = UNCHANGED
) -> Sampler:
    if table.boxes is None:
        return build_transform(augment, side, train=train, views=views)
    most = table.boxes.most
    return box_transforms.build_box_transform(augment, side, train=train, most=most)


def _score(table: ImageTable, data: DataConfig) -> str:
    """Return the metric by which models are ranked; see ``check_score`` for errors."""
    wanted = data.score
    check_score(wanted, table.task, has_labels=not lacks_labels(data.dataset))
    if wanted != "auto":
        return wanted
    if lacks_labels(data.dataset):
        return "cka"
    return "accuracy" if table.boxes is None else dataset_class(table.dataset).score


def _class_counts(table: ImageTable, rows: NDArray[np.int64]) -> tuple[int, ...]:
    """Return the number of images of each class; none for detection."""
    if table.boxes is not None:
        return ()
    return tuple(np.bincount(table.labels[rows], minlength=len(table.class_names)).tolist())


def imbalance(images: Images) -> str | None:
    """Return a note if a class has far more training images than another; else None."""
    spec = images.spec
    if spec.task != "classification" or not spec.has_labels or spec.score in BALANCED:
        return None
    counts = np.array(images.spec.class_counts)
    least, most = int(counts.argmin()), int(counts.argmax())
    if counts[most] <= IMBALANCE * counts[least]:
        return None
    names = images.spec.class_names
    return (
        f"classes are imbalanced: {names[most]} has {counts[most]:,} training images and "
        f"{names[least]} {counts[least]:,}; accuracy gives small classes little weight; --score "
        "balanced-accuracy weights all classes equally"
    )


def shards(data: DataConfig, output: Place, progress: Progress | None = None) -> str:
    """Return the path of a data set's Parquet shards, preparing them in ``output`` if needed."""
    check_dataset(data.dataset, data.data_dir)
    if data.dataset == "parquet":
        assert data.data_dir is not None
        return data.data_dir
    if lacks_labels(data.dataset) and data.data_dir is not None:
        check_exists(data.data_dir)
        if holds_parquet(data.data_dir):
            return data.data_dir
        check_folder(data.data_dir)
    source = open_source(
        data.dataset,
        data.data_dir,
        data.download,
        strict=data.strict,
        years=tuple(map(str, data.years)),
        classes=data.classes,
        own=owned_by(entry_name(data.dataset), data.own),
    )
    folder = output / "data" / f"{source.name}-{source_identity(source, [data.skip_bad])}"
    # a local folder is created when complete; in an object store, shards appear one by one
    complete = folder / COMPLETE if is_remote(folder) else folder
    if not complete.exists():
        remove_folder(folder)
        prepare(source, str(folder), skip_bad=data.skip_bad, strict=data.strict, progress=progress)
        if is_remote(folder):
            write_text(complete, "")
    return str(folder)


def _sizes(table: ImageTable, rows: NDArray[np.int64], *, skip_bad: bool) -> NDArray[np.int64]:
    """Return height and width of a sample of training images from few row groups (images, 2)."""
    sample = shuffled(rows, table.units.first, seed=0)[:SIZE_SAMPLE]
    decoded = decode_rows(table, sample, skip_bad=skip_bad)
    sizes = [image_CHW.shape[1:] for image_CHW in decoded if image_CHW is not None]
    if not sizes:
        raise DataError(f"none of {len(sample)} sampled images in '{table.path}' can be decoded")
    return np.array(sizes)
