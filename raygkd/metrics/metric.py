"""Measures of models that are registered by name; models can be ranked by each of them.

Shapes: B batch, K classes, N images.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from raygkd.errors import ConfigError
from raygkd.registry import METRICS

# numbers that the sums of every image may take: 256 MiB
MOST_PARTS = 1 << 25


class Metric(ABC):
    """A measure that follows from sums over images.

    ``@METRICS.register(name)`` enters a subclass. It is computed on the validation images after
    every epoch ("val_NAME", also in searches and MLflow), and on the images on which finished
    models are scored; tables and reports show it.

    Args:
        num_classes: K.

    Attributes:
        task: "classification" or "detection".
        title: what tables and reports call it.
        higher_is_better: whether a larger value is a better one.
        form: how its value is written, as ``format`` takes it.
        size: how many sums it needs; one that depends on K is set in ``__init__``.
    """

    task: ClassVar[str] = "classification"
    title: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    form: ClassVar[str] = ".4f"
    size: int = 2

    def __init__(self, num_classes: int):
        self.num_classes = num_classes

    @abstractmethod
    def sums(self, output: Any, truth: Any) -> Tensor:
        """Return what a batch contributes to the sums (size,), added over batches and ranks.

        Args:
            output: logits (B, K); of a detector a list of ``Detections``, one for each image.
            truth: labels (B,), int64; for a detector a list of ``ImageBoxes``.
        """

    def value(self, sums: Tensor) -> float:
        """Return the measure of the sums (size,); unless overridden the first over the second."""
        return float(sums[0] / sums[1])

    @classmethod
    def label(cls) -> str:
        """Return the title, with a note where a lower value is better."""
        return cls.title if cls.higher_is_better else f"{cls.title} (lower is better)"


def registered_metrics() -> dict[str, type[Metric]]:
    """Return name -> class of every registered metric."""
    return {name: METRICS.get(name) for name in METRICS.names()}


class RegisteredMeter:
    """Adds up the sums of all registered metrics of a task.

    Args:
        task: "classification" or "detection".
        num_classes: K.
        by_image: metric whose sums are kept for every image too; None for none.
    """

    def __init__(self, task: str, num_classes: int, by_image: str | None = None):
        classes = {name: cls for name, cls in registered_metrics().items() if cls.task == task}
        self._metrics = {name: cls(num_classes) for name, cls in classes.items()}
        self._sums = {
            name: torch.zeros(metric.size, dtype=torch.float64)
            for name, metric in self._metrics.items()
        }
        self._by_image = self._metrics.get(by_image) if by_image is not None else None
        self._parts: list[Tensor] = []

    def update(self, output: Any, truth: Any) -> None:
        """Add a batch; see ``Metric.sums``."""
        for name, metric in self._metrics.items():
            added = metric.sums(output, truth).double()
            self._sums[name] = self._sums[name].to(added.device) + added
        if self._by_image is not None and self._by_image.size * len(self._parts) < MOST_PARTS:
            self._parts += [
                self._by_image.sums(output[n : n + 1], truth[n : n + 1]).double().cpu()
                for n in range(len(output))
            ]

    def parts(self) -> Tensor | None:
        """Return the sums of every image (N, size), in the order in which they were added.

        None where they are not kept, or would take more than ``MOST_PARTS`` numbers.
        """
        if self._by_image is None or self._by_image.size * len(self._parts) >= MOST_PARTS:
            return None
        return torch.stack(self._parts)

    def reduce(self, all_sum: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Replace the sums by those of all ranks; once, after the last batch.

        Args:
            all_sum: returns the sum of a tensor over the ranks, on every rank.
            device: where the ranks exchange tensors.
        """
        self._sums = {name: all_sum(sums.to(device)) for name, sums in self._sums.items()}

    def added_to(self, scores: dict[str, Any]) -> dict[str, Any]:
        """Return scores with the values of the metrics.

        Raises:
            ConfigError: a metric has the name of another score.
        """
        for name in self._metrics.keys() & scores.keys():
            raise ConfigError(f"metric {name!r}: a score already has this name; rename the metric")
        values = {name: one.value(self._sums[name].cpu()) for name, one in self._metrics.items()}
        return {**scores, **values}
