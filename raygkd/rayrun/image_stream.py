"""Stream images from Parquet shards into training processes, through Ray or in one process.

There are two modes, with identical batches. If the decoded images fit in memory, the driver decodes
them once into the object store, or keeps them without a cluster, and each rank of a run augments
its own batches. Otherwise one Ray Data execution per rank reads, decodes and augments the windows
of all epochs, training and validation in turn, ahead of training and within bounded memory. An
execution takes seconds to start, so there is one per run, not one per epoch.

Shapes: B batch, N rows of a window, H height, W width, S side of the square model input.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raygkd.data import plan
from raygkd.data.boxes import Boxes
from raygkd.data.loader import rebatch
from raygkd.data.run_images import Images
from raygkd.data.spec import ImageSpec
from raygkd.data.views import UNCHANGED, Views
from raygkd.data.windows import (
    Arrays,
    Sampler,
    Window,
    decode_rows,
    load_window,
    targets_of,
    transform_window,
)
from raygkd.errors import DataError
from raygkd.rayrun import references
from raygkd.rayrun.references import Reference

# the labelled training images without random changes, as a split to evaluate
LABELLED = "labelled"
# CPUs of the cluster that are kept free for the tasks that decode streamed images
DATA_CPUS = 1.0
# most bytes of decoded windows that wait for one rank
STREAM_BYTES = 256 << 20
# from one look of Ray Data at its tasks to the next; it starts one at the second look after another
# has ended, and with its own 0.1 s a processor would wait half as long as it decodes
LOOK_SECONDS = 0.02
# more of them wait for each other where images are small
DECODING_THREADS = 8


@dataclass(frozen=True)
class DecodedRows:
    """Decoded images of one row group.

    Attributes:
        rows: row numbers, ascending (N,).
        images: uint8 (N, 3, H, W), or a list of (3, H, W) of different sizes, None where broken.
    """

    rows: NDArray[np.int64]
    images: NDArray[np.uint8] | list[NDArray[np.uint8] | None]


@dataclass(frozen=True, kw_only=True)
class SharedImages:
    """References to images, small enough to send to every process if in the object store.

    Attributes:
        images: reference to the Images (table, splits, transforms).
        spec: of the images, for the models.
        decoded: references to DecodedRows in the order of the rows; None if streamed.
        augment: kind of the training transform; None for that of the images.
    """

    images: Reference
    spec: ImageSpec
    decoded: tuple[Reference, ...] | None
    augment: str | None = None

    def of_trial(self, params: Mapping[str, Any]) -> SharedImages:
        """Return the images for a trial with these settings, of which only some count."""
        return dataclasses.replace(
            self, spec=self.spec.of_trial(params), augment=params.get("augment", self.augment)
        )

    def get(self) -> Images:
        """Return the Images, with the augmentation."""
        images: Images = references.get(self.images)
        if self.augment is None:
            return images
        return dataclasses.replace(images, augment=self.augment)


def fits_in_memory(images: Images, cache_mb: int) -> bool:
    """Return whether the decoded images take at most ``cache_mb`` MiB."""
    return images.decoded_bytes <= cache_mb << 20


def share(
    images: Images, cache_mb: int, progress: Callable[[int, int], None] | None = None
) -> SharedImages:
    """Put images where all processes of a run can read them, decoded if they fit.

    Args:
        images: what to share.
        cache_mb: maximum MiB of decoded images.
        progress: is called with the row groups done and their number.

    Raises:
        DataError: a broken image, unless they are skipped.
    """
    decoded = None
    if fits_in_memory(images, cache_mb):
        decoded = tuple(_decoded_rows(images, progress or (lambda done, total: None)))
    return SharedImages(images=references.put(images), spec=images.spec, decoded=decoded)


def _decoded_rows(images: Images, progress: Callable[[int, int], None]) -> Iterator[Reference]:
    """Decode all row groups in use; yield references to DecodedRows, in order.

    Uses threads of this process: starting a Ray worker that imports torch and torchvision takes
    longer than decoding 60,000 small images.
    """
    used = np.sort(np.concatenate(list(images.rows.values())))
    units = np.searchsorted(images.table.units.first, used, side="right") - 1
    groups = [used[units == unit] for unit in np.unique(units)]
    pool = ThreadPoolExecutor(min(os.cpu_count() or 1, DECODING_THREADS))
    try:
        for done, reference in enumerate(
            pool.map(lambda rows: references.put(_decode(images, rows)), groups), start=1
        ):
            progress(done, len(groups))
            yield reference
    finally:
        pool.shutdown(cancel_futures=True)


def _decode(images: Images, rows: NDArray[np.int64]) -> DecodedRows:
    arrays = [
        None if image is None else image.numpy()
        for image in decode_rows(images.table, rows, skip_bad=images.skip_bad)
    ]
    good = [array for array in arrays if array is not None]
    if len(good) == len(arrays) and len({array.shape for array in good}) == 1:
        return DecodedRows(rows, np.stack(good))
    return DecodedRows(rows, arrays)


class RayStream:
    """One rank's images (the ``Stream`` of the training loop).

    Args:
        shared: the images.
        batch_size: images of a batch on this rank.
        seed: of order and augmentation.
        epochs: the epochs to train, in order; empty for evaluation only.
        rank: from 0 to ``world_size - 1``.
        world_size: number of ranks.
        views: changes of training images after their crop.
        unlabelled_share: share of each batch that has no labels, if there are such images; 0 leaves
            them out.
        skips_unlabelled: see ``plan.Mix``.

    Raises:
        ConfigError: there are not enough images for one batch on every rank.
    """

    def __init__(
        self,
        shared: SharedImages,
        *,
        batch_size: int,
        seed: int,
        epochs: range,
        rank: int,
        world_size: int,
        views: Views = UNCHANGED,
        unlabelled_share: float = 0.0,
        skips_unlabelled: bool = False,
    ):
        self._images = shared.get()
        self._plan = _Plan(
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            views=views,
            unlabelled_share=unlabelled_share,
            skips_unlabelled=skips_unlabelled,
        )
        self._epochs = epochs
        self._shared = shared
        self._decoded = None if shared.decoded is None else _Decoded(shared.decoded)
        self._ahead: _Ahead | None = None
        self._bad_rows: set[int] = set()
        self.steps_per_epoch = 0
        if epochs:
            self.steps_per_epoch = self._plan.steps_per_epoch(self._images)

    @property
    def bad_images(self) -> int:
        """Number of distinct unreadable images this rank has met."""
        return len(self._bad_rows)

    @property
    def boxes(self) -> Boxes | None:
        """The boxes of every image of the table, for detection."""
        return self._images.table.boxes

    @property
    def repeats(self) -> bool:
        """Whether a training image is the same in every epoch."""
        return self._images.repeats and not self._plan.views.are_random

    def train_batches(self, epoch: int) -> Iterator[dict[str, Tensor]]:
        """Yield the batches of an epoch, with the arrays of a ``Window``."""
        return self._batches(Pass("train", epoch))

    def eval_batches(self, split: str) -> Iterator[dict[str, Tensor]]:
        """Yield this rank's share of a split, every image once; the last batch may be short.

        The split "labelled" has the labelled training images as they are for evaluation.
        """
        return self._batches(Pass(split, 0))

    def close(self) -> None:
        """Stop reading ahead."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _batches(self, wanted: Pass) -> Iterator[dict[str, Tensor]]:
        windows = self._from_memory(wanted) if self._decoded else self._from_stream(wanted)
        for batch in rebatch(self._counted(windows), self._plan.batch_size, drop_last=False):
            # what lies in the object store is read-only
            yield {name: torch.from_numpy(np.array(array)) for name, array in batch.items()}

    def _counted(self, windows: Iterable[Window]) -> Iterator[Arrays]:
        for window in windows:
            bad_rows = plan.rows_of_table(window.bad_rows, len(self._images.table))
            self._bad_rows.update(bad_rows.tolist())
            yield window.arrays

    def _from_memory(self, wanted: Pass) -> Iterator[Window]:
        assert self._decoded is not None
        for rows in self._plan.windows(self._images, wanted):
            of_table = plan.rows_of_table(rows, len(self._images.table))
            yield transform_window(
                self._decoded.take(of_table),
                rows,
                targets_of(self._images.table, of_table),
                self._images.transform(wanted.split, self._plan.views),
                seed=self._plan.seed,
                epoch=wanted.epoch,
                exact=wanted.split == "train",
            )

    def _from_stream(self, wanted: Pass) -> Iterator[Window]:
        if self._ahead is None or self._ahead.next_pass() != wanted:
            self.close()
            self._ahead = _Ahead(self._shared, self._images, self._plan, self._coming(wanted))
        return self._ahead.take()

    def _coming(self, wanted: Pass) -> list[Pass]:
        """Return the passes to read, from ``wanted`` on."""
        if wanted.split != "train":
            return [wanted]
        rest = [epoch for epoch in self._epochs if epoch >= wanted.epoch]
        return [part for epoch in rest for part in (Pass("train", epoch), Pass("val", 0))]


class Pass(NamedTuple):
    """One pass over a split; the epoch is 0 for all but training."""

    split: str
    epoch: int


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """The windows that a rank reads, and how their images are changed."""

    batch_size: int
    seed: int
    rank: int
    world_size: int
    views: Views
    unlabelled_share: float
    skips_unlabelled: bool

    def mix(self, images: Images) -> plan.Mix | None:
        """Return how images with and without labels are mixed; None if there are labels alone."""
        if not self.unlabelled_share or "unlabelled" not in images.rows:
            return None
        return plan.Mix(
            labelled=images.rows["train"],
            unlabelled=images.rows["unlabelled"],
            share=self.unlabelled_share,
            num_rows=len(images.table),
            skips_unlabelled=self.skips_unlabelled,
        )

    def steps_per_epoch(self, images: Images) -> int:
        """Return the training batches of every rank in an epoch."""
        mix = self.mix(images)
        if mix is not None:
            return mix.steps_per_epoch(self.world_size, self.batch_size)
        return plan.steps_per_epoch(len(images.rows["train"]), self.world_size, self.batch_size)

    def windows(self, images: Images, wanted: Pass) -> list[NDArray[np.int64]]:
        """Return the row numbers of each window of a pass, in order."""
        rows = images.rows["train" if wanted.split == LABELLED else wanted.split]
        if wanted.split != "train":
            part = plan.evaluation_rows(rows, self.rank, self.world_size)
            return plan.cut_windows(part, images.window_rows)
        how: dict[str, int] = {
            "seed": self.seed,
            "epoch": wanted.epoch,
            "rank": self.rank,
            "world_size": self.world_size,
            "batch_size": self.batch_size,
            "window_rows": images.window_rows,
        }
        unit_starts, mix = images.table.units.first, self.mix(images)
        if mix is not None:
            return mix.windows(unit_starts, **how)
        return plan.epoch_windows(rows, unit_starts, **how)

    def count(self, images: Images, wanted: Pass) -> int:
        """Return the number of windows of a pass, the same in every training epoch."""
        return len(self.windows(images, wanted))


class _Decoded:
    """Decoded images by row, read in place from the object store."""

    def __init__(self, decoded: tuple[Reference, ...]):
        self._groups: list[DecodedRows] = [references.get(one) for one in decoded]
        self._first = np.array([group.rows[0] for group in self._groups])

    def take(self, rows: NDArray[np.int64]) -> Iterator[Tensor | None]:
        """Yield uint8 (3, H, W) for each row, None for an unreadable one."""
        groups = np.searchsorted(self._first, rows, side="right") - 1
        for row, number in zip(rows, groups, strict=True):
            group = self._groups[number]
            image = group.images[int(np.searchsorted(group.rows, row))]
            yield None if image is None else torch.from_numpy(np.array(image))


class _Ahead:
    """A Ray Data execution over several passes, in order, with one task per window."""

    def __init__(self, shared: SharedImages, images: Images, rank_plan: _Plan, passes: list[Pass]):
        counts = {part: rank_plan.count(images, part) for part in dict.fromkeys(passes[:2])}
        tasks = [
            (turn, number)
            for turn, part in enumerate(passes)
            for number in range(counts[passes[turn % 2]])
        ]
        self._passes = passes
        self._turn = 0
        self._blocks: Generator[Arrays, None, None] = self._execute(
            shared, rank_plan, passes, tasks
        )
        self._held: Arrays | None = next(self._blocks, None)

    @staticmethod
    def _execute(
        shared: SharedImages,
        rank_plan: _Plan,
        passes: list[Pass],
        tasks: list[tuple[int, int]],
    ) -> Generator[Arrays, None, None]:
        # images that fit in memory do not need what this imports
        import ray

        from raygkd.rayrun.ray_internals import look_often

        def load(batch: Arrays) -> Arrays:
            turn, number = tasks[int(batch["id"][0])]
            part = passes[turn]
            images = shared.get()
            transform = images.transform(part.split, rank_plan.views)
            try:
                window = load_window(
                    images.table,
                    rank_plan.windows(images, part)[number],
                    transform,
                    seed=rank_plan.seed,
                    epoch=part.epoch,
                    skip_bad=images.skip_bad,
                    exact=part.split == "train",
                )
            except DataError as error:
                return _pack(_nothing(transform), transform, turn, problem=str(error))
            return _pack(window, transform, turn)

        look_often(LOOK_SECONDS)
        dataset = ray.data.range(len(tasks), override_num_blocks=len(tasks)).map_batches(
            load, batch_size=1, num_cpus=DATA_CPUS
        )
        options = dataset.context.execution_options
        options.preserve_order = True
        options.resource_limits = options.resource_limits.copy(object_store_memory=STREAM_BYTES)
        dataset.context.enable_progress_bars = False
        # Ray Data, which has set its level by now, would describe each execution
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        yield from dataset.iter_batches(batch_size=None, batch_format="numpy")

    def next_pass(self) -> Pass | None:
        """Return the next pass of ``take``."""
        return self._passes[self._turn] if self._turn < len(self._passes) else None

    def take(self) -> Iterator[Window]:
        """Yield the windows of the next pass."""
        turn = self._turn
        self._turn += 1
        while self._held is not None and self._held["turn"][0] == turn:
            if self._held["problem"][0]:
                raise DataError(str(self._held["problem"][0]))
            yield _unpack(self._held)
            self._held = next(self._blocks, None)

    def close(self) -> None:
        """Stop the execution."""
        self._blocks.close()


def _nothing(transform: Sampler) -> Window:
    """Return a window of one unreadable row."""
    arrays = {name: value[None][:0] for name, value in transform.blank().items()}
    return Window(arrays | {"row": np.zeros(0, np.int64)}, bad_rows=np.full(1, -1, np.int64))


def _pack(window: Window, transform: Sampler, turn: int, problem: str = "") -> Arrays:
    """Return columns of equal length; an unreadable row becomes a blank sample that is marked.

    Errors are passed in a column, because Ray Data turns exceptions into text.
    """
    good, bad = len(window.arrays["row"]), len(window.bad_rows)
    blanks = {name: np.repeat(value[None], bad, 0) for name, value in transform.blank().items()}
    blanks["row"] = window.bad_rows
    packed = {name: np.concatenate([window.arrays[name], blanks[name]]) for name in blanks}
    return packed | {
        "is_bad": np.repeat([False, True], [good, bad]),
        "turn": np.full(good + bad, turn),
        "problem": np.full(good + bad, problem, dtype=object),
    }


def _unpack(packed: Arrays) -> Window:
    bad = packed["is_bad"]
    columns = packed.keys() - {"is_bad", "turn", "problem"}
    arrays = {name: packed[name][~bad] if bad.any() else packed[name] for name in columns}
    return Window(arrays, packed["row"][bad])
