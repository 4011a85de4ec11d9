"""Images and labels from Python: a dataset of pairs, or a loader of batches of pairs.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from raygkd.errors import DataError, text_of

Data = Dataset[Any] | Iterable[Any]


class PairStream:
    """Pairs of images and labels as batches for the training loop.

    Args:
        train: data to train on.
        val: data to validate on; None for none.
        batch_size: images of a batch, where the data is a dataset.
        seed: of the order of a dataset's images.

    Raises:
        DataError: data without a length, without an image, or of another kind.
    """

    bad_images = 0
    boxes = None

    def __init__(self, train: Data, val: Data | None, batch_size: int, seed: int):
        self._train = _batches(train, "train_data", batch_size, seed)
        self._val = [] if val is None else _batches(val, "val_data", batch_size, None)
        self.steps_per_epoch = len(self._train)

    def train_batches(self, epoch: int) -> Iterator[Mapping[str, Tensor]]:
        """Yield "image" and "label" of each batch."""
        return map(_batch, self._train)

    def eval_batches(self, split: str) -> Iterator[Mapping[str, Tensor]]:
        """Yield the batches of the validation data."""
        return map(_batch, self._val)

    def close(self) -> None:
        """Do nothing: this stream does not prefetch."""


def _batches(data: Data, name: str, batch_size: int, seed: int | None) -> Any:
    """Return an iterable of batches with a length, shuffled if there is a seed.

    Raises:
        DataError: no length, or no batch.
    """
    count = _length(data, name)
    # a loader has no __getitem__
    if count and hasattr(data, "__getitem__"):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        data = DataLoader(
            data,  # type: ignore[arg-type]
            batch_size,
            shuffle=seed is not None,
            # batch normalisation needs more than one image
            drop_last=seed is not None and count >= batch_size,
            collate_fn=_collate,
            generator=generator,
        )
    if not count:
        raise DataError(f"{name}: contains no images")
    return data


def _collate(pairs: list[Any]) -> Any:
    """Return some of a dataset's pairs as a batch; DataError if they cannot be stacked."""
    try:
        return default_collate(pairs)
    except (RuntimeError, TypeError) as error:
        raise DataError(
            "data: images and labels must be tensors, arrays or numbers of one shape and type to "
            f"form a batch ({text_of(error)})"
        ) from error


def _length(data: Any, name: str) -> int:
    try:
        return len(data)
    except TypeError as error:
        raise DataError(
            f"{name}: a {type(data).__name__} has no length; use a map-style dataset of pairs "
            "(image, label), or a DataLoader of one"
        ) from error


def _batch(batch: Any) -> dict[str, Tensor]:
    """Return a batch in the form that the training loop expects.

    Raises:
        DataError: it is not a pair of tensors.
    """
    if not (isinstance(batch, Sequence) and len(batch) == 2):
        raise DataError(
            f"data: a batch is a {type(batch).__name__}, not a pair (images, labels); use a "
            "dataset of pairs (image, label)"
        )
    images, labels = batch
    for name, value in (("images", images), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise DataError(
                f"data: the {name} of a batch are a {type(value).__name__}, not a tensor; convert "
                "them to tensors in the dataset (torchvision.transforms.v2.ToImage for PIL images)"
            )
    return {"image": images, "label": labels}
