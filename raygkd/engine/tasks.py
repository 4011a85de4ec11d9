"""The tasks, classification and detection: targets, training metrics and scores.

Shapes: B batch, C channels, H height, W width, S side of the square input, K classes, M boxes of an
image, D detections of an image.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from raygkd.data.boxes import Boxes
from raygkd.engine.distributed import all_sum, gather
from raygkd.engine.means import RunningMeans
from raygkd.engine.pooled_features import NeighbourProbe, neighbour_probe
from raygkd.metrics.classification import ClassificationMeter
from raygkd.metrics.detection import DetectionMeter, Detections
from raygkd.metrics.metric import RegisteredMeter

Batch = Mapping[str, Tensor]
Inputs = Callable[[Batch], Tensor]


def pixels(batch: Batch, device: torch.device) -> Tensor:
    """Return a batch's images on a device, as float (B, 3, S, S) in 0..1."""
    return batch["image"].to(device, non_blocking=True).float().div(255.0)


class TrainingMeter(Protocol):
    """Accumulates metrics of an epoch's training steps, besides the loss terms."""

    def update(self, output: Any, batch: Batch) -> None:
        """Add the objective's output for a batch."""

    def compute(self) -> dict[str, float]:
        """Return "images", their number, and the metrics, over all ranks."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums of this rank so far."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the result of ``state_dict``."""


class Task(Protocol):
    """The part of training that depends on the kind of targets.

    Attributes:
        lead_score: the score, from 0 to 1, in which the teacher's lead is measured.
    """

    lead_score: ClassVar[str]

    def targets(self, batch: Batch, device: torch.device) -> Any:
        """Return the targets of a batch for the objective."""

    def is_blank(self, batch: Batch) -> bool:
        """Return whether a batch has no targets at all."""

    def meter(self, device: torch.device) -> TrainingMeter:
        """Return a meter for one epoch of training."""

    def score(self, model: nn.Module, batches: Iterable[Batch], inputs: Inputs) -> dict[str, Any]:
        """Return "score", by which models are ranked, other metrics, and lists by class.

        Args:
            model: model in eval mode.
            batches: this rank's share of the images.
            inputs: converts a batch to the model's input (B, 3, S, S) on its device.
        """


@dataclass(frozen=True)
class Classification:
    """Images belong to one of K classes.

    Attributes:
        num_classes: K.
        measure: the registered metric that is the score, or "knn": the accuracy of the nearest of
            ``neighbours`` by pooled features, which does not read the last layer.
        unlabelled_share: share of each training batch that has no label, "label" -1.
        neighbours: returns this rank's share of the labelled training images, without changes.
    """

    lead_score: ClassVar[str] = "accuracy"
    num_classes: int
    measure: str = "accuracy"
    unlabelled_share: float = 0.0
    neighbours: Callable[[], Iterable[Batch]] | None = None

    def targets(self, batch: Batch, device: torch.device) -> Tensor:
        """Return the labels (B,); of mixed images the shares of the classes (B, K)."""
        return batch["shares" if "shares" in batch else "label"].to(device, non_blocking=True)

    def is_blank(self, batch: Batch) -> bool:
        """Return whether no image of a batch has a label."""
        return self.unlabelled_share > 0 and bool((batch["label"] < 0).all())

    def meter(self, device: torch.device) -> TrainingMeter:
        """Return a meter of "train_accuracy", of the images with labels."""
        if self.unlabelled_share == 1:
            return ImageMeter(device)
        kind = _PartMeter if self.unlabelled_share else _AccuracyMeter
        return kind(self.num_classes, device)

    @torch.no_grad()
    def score(
        self, model: nn.Module, batches: Iterable[Batch], inputs: Inputs, *, by_image: bool = False
    ) -> dict[str, Any]:
        """Return "score", "loss", beyond 5 classes "top5", and the registered metrics.

        If the score is "knn", that too, and of a model without classes nothing else. With
        ``by_image``, for one rank alone, also "parts": the sums of every image (N, size) that the
        score follows from, None if there are too many.
        """
        device = next(model.parameters()).device
        has_classes = True
        meter = ClassificationMeter(self.num_classes, device=device)
        kept = self.measure if by_image else None
        registered = RegisteredMeter("classification", self.num_classes, kept)
        with self._probe(model, inputs) as probe:
            for batch in batches:
                images_BCHW, labels_B = inputs(batch), self.targets(batch, device)
                logits_BK = probe(images_BCHW, labels_B) if probe else model(images_BCHW)
                has_classes = logits_BK.shape[1] == self.num_classes
                if has_classes or probe is None:
                    meter.update(logits_BK, labels_B)
                    registered.update(logits_BK, labels_B)
        found = {"knn": probe.accuracy()} if probe else {}
        if probe and not has_classes:
            return {"score": found["knn"], **found}
        meter.reduce(all_sum)
        registered.reduce(all_sum, device)
        of_logits = meter.compute()
        keep: dict[str, Any] = {
            name: of_logits[name] for name in ("loss", "top5") if name in of_logits
        }
        scores = registered.added_to({**keep, **found})
        parts = {"parts": registered.parts()} if by_image else {}
        return {"score": scores[self.measure], **scores, **parts}

    def _probe(
        self, model: nn.Module, inputs: Inputs
    ) -> contextlib.AbstractContextManager[NeighbourProbe | None]:
        if self.measure != "knn":
            return contextlib.nullcontext()
        assert self.neighbours is not None
        return neighbour_probe(model, self.neighbours(), inputs, self.num_classes)


class _AccuracyMeter:
    def __init__(self, num_classes: int, device: torch.device):
        self._meter = ClassificationMeter(num_classes, device=device)

    def update(self, output: Tensor, batch: Batch) -> None:
        self._meter.update(output, batch["label"].to(output.device))

    def compute(self) -> dict[str, float]:
        self._meter.reduce(all_sum)
        scores = self._meter.compute()
        return {"images": scores["count"], "train_accuracy": scores["accuracy"]}

    def state_dict(self) -> dict[str, Tensor]:
        return self._meter.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._meter.load_state_dict(state)


class ImageMeter:
    """Counts the images of an epoch's training steps.

    Args:
        device: of the count.
    """

    def __init__(self, device: torch.device):
        self._images = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, output: Any, batch: Batch) -> None:
        """Add a batch."""
        self._images += len(batch["image"])

    def compute(self) -> dict[str, float]:
        """Return "images", their number over all ranks."""
        return {"images": float(all_sum(self._images))}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the number on this rank so far."""
        return {"images": self._images}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the result of ``state_dict``."""
        self._images = state["images"].to(self._images.device)


class _PartMeter:
    """Counts all images, and gives the accuracy of those with labels."""

    def __init__(self, num_classes: int, device: torch.device):
        self._every = ImageMeter(device)
        self._labelled = _AccuracyMeter(num_classes, device)

    def update(self, output: Tensor, batch: Batch) -> None:
        self._every.update(output, batch)
        has_label_B = batch["label"] >= 0
        known = {"label": batch["label"][has_label_B]}
        self._labelled.update(output[has_label_B.to(output.device)], known)

    def compute(self) -> dict[str, float]:
        return {**self._labelled.compute(), **self._every.compute()}

    def state_dict(self) -> dict[str, Tensor]:
        return {**self._labelled.state_dict(), **self._every.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._labelled.load_state_dict(state)
        self._every.load_state_dict(state)


@dataclass(frozen=True)
class Detection:
    """Images contain boxes of K classes; the score is a mean average precision.

    Attributes:
        num_classes: K.
        boxes: boxes of every image of the table, by row, in pixels of the original image.
        measure: metric used as score: "map" (mean over IoU 0.5 to 0.95), "map50", or a registered
            metric.
    """

    lead_score: ClassVar[str] = "map"
    num_classes: int
    boxes: Boxes
    measure: str

    def targets(self, batch: Batch, device: torch.device) -> list[dict[str, Tensor]]:
        """Return "boxes" (M, 4) in pixels of the canvas and "labels" (M,) of each image."""
        boxes, classes = (
            batch[name].to(device, non_blocking=True) for name in ("boxes", "classes")
        )
        return [
            {"boxes": boxes_M4[labels_M >= 0], "labels": labels_M[labels_M >= 0]}
            for boxes_M4, labels_M in zip(boxes, classes, strict=True)
        ]

    def is_blank(self, batch: Batch) -> bool:
        """Return whether no image of a batch has a box."""
        return bool((batch["classes"] < 0).all())

    def meter(self, device: torch.device) -> TrainingMeter:
        """Return a meter of the parts of the task loss, "loss_task_NAME"."""
        return _PartsMeter(device)

    @torch.no_grad()
    def score(
        self, model: nn.Module, batches: Iterable[Batch], inputs: Inputs, *, by_image: bool = False
    ) -> dict[str, Any]:
        """Return "score", what ``DetectionMeter.compute`` does, and the registered metrics.

        With ``by_image`` as for classification; "parts" is None for an average precision.
        """
        meter = DetectionMeter(self.num_classes)
        kept = self.measure if by_image else None
        registered = RegisteredMeter("detection", self.num_classes, kept)
        for batch in batches:
            detections = [
                on_image(output, float(ratio))
                for output, ratio in zip(model(inputs(batch)), batch["ratio"])
            ]
            meter.update(batch["row"], detections)
            registered.update(detections, [self.boxes[row] for row in batch["row"].tolist()])
        meter.reduce(lambda rows: torch.cat(gather(rows)))
        # a model without parameters is on the CPU
        devices = (parameter.device for parameter in model.parameters())
        device = next(devices, torch.device("cpu"))
        registered.reduce(all_sum, device)
        scores = registered.added_to(meter.compute(self.boxes))
        parts = {"parts": registered.parts()} if by_image else {}
        return {"score": scores[self.measure], **scores, **parts}


def on_image(output: Mapping[str, Tensor], ratio: float) -> Detections:
    """Return a detector's output on the canvas as detections on the original image."""
    return Detections(
        xyxy=(output["boxes"].float() / ratio).cpu().numpy(),
        label=output["labels"].cpu().numpy(),
        score=output["scores"].float().cpu().numpy(),
    )


class _PartsMeter:
    def __init__(self, device: torch.device):
        self._images = torch.zeros((), dtype=torch.float64, device=device)
        self._means = RunningMeans(device)

    def update(self, output: Mapping[str, Tensor], batch: Batch) -> None:
        self._images += len(batch["image"])
        self._means.add(output)

    def compute(self) -> dict[str, float]:
        parts = {f"loss_task_{name}": mean for name, mean in self._means.compute().items()}
        return {"images": float(all_sum(self._images)), **parts}

    def state_dict(self) -> dict[str, Tensor]:
        return {"images": self._images, **self._means.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        means = dict(state)
        self._images = means.pop("images").to(self._images.device)
        self._means.load_state_dict(means)
