"""Scores of detectors: COCO's mean average precision, and Pascal VOC's average precision.

Both are means over classes of the area below a class's curve of precision over recall, where a
detection is right if it overlaps an object of its class enough that no better one has claimed.
Sides are continuous coordinates: a box is x1 - x0 wide, without the extra pixel of the VOC devkit.
Equal scores are ordered by image, then as they stand in the image, so that results are exact.

Shapes: D detections of one image or of all, M objects, P pairs of both, B images of a batch,
4 the sides of a box (x0, y0, x1, y1) in pixels of the upright original image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raygkd.data.boxes import Boxes, ImageBoxes
from raygkd.errors import DataError

VOC_OVERLAP = 0.5
# of COCO's table of precision: IoU from 0.5 to 0.95 in steps of 0.05, and sizes of objects
_IOU_50, _IOU_75 = 0, 5
_SIZES = ("all", "small", "medium", "large")


@dataclass(frozen=True, eq=False)
class Detections:
    """What a detector finds in one image.

    Attributes:
        xyxy: sides of each box in pixels of the original image, float32 (D, 4).
        label: position in the class names, int64 (D,).
        score: confidence, higher is surer, float32 (D,).
    """

    xyxy: NDArray[np.float32]
    label: NDArray[np.int64]
    score: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.label)


class Targets(Protocol):
    """The objects of images by row: ``Boxes``, or a dict of ``ImageBoxes``."""

    def __getitem__(self, image: int, /) -> ImageBoxes:
        """Return the objects of one image."""


def coco_scores(
    detections: Sequence[Detections], targets: Sequence[ImageBoxes], num_classes: int
) -> dict[str, Any]:
    """Return COCO's mean average precision, computed by faster-coco-eval.

    Per class and image the 100 surest detections count. Crowd boxes are COCO's ``iscrowd``;
    difficult ones, which COCO does not know, count like any other. The size of an object is the
    area of its box (COCO's own annotations give that of the outline, which is smaller).

    Args:
        detections: of each image, at least one.
        targets: the objects of the same images, in the same order.
        num_classes: labels are in 0..num_classes-1.

    Returns:
        "map" (mean of IoU 0.5, 0.55 .. 0.95), "map50", "map75", and "map_small" (area up to 32^2
        pixels), "map_medium" (up to 96^2), "map_large": in 0..1, None where there is no such
        object. "per_class" and "per_class50" are lists of the same by class.

    Raises:
        ValueError: detections and targets differ in number, or a label is not a class.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    _check(detections, targets, num_classes)
    images = [{"id": image} for image in range(len(targets))]
    categories = [{"id": label} for label in range(num_classes)]
    truth = COCO({"images": images, "categories": categories, "annotations": _objects(targets)})
    evaluation = COCOeval_faster(truth, truth.loadRes(_results(detections)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    # overlap, recall, class, size; of the counts of detections only the largest, 100
    precision = evaluation.eval["precision"][..., -1]
    scores = {"map": _mean(precision[:, :, :, 0])}
    scores["map50"] = _mean(precision[_IOU_50, :, :, 0])
    scores["map75"] = _mean(precision[_IOU_75, :, :, 0])
    for place, size in enumerate(_SIZES[1:], start=1):
        scores[f"map_{size}"] = _mean(precision[:, :, :, place])
    classes = range(num_classes)
    return scores | {
        "per_class": [_mean(precision[:, :, label, 0]) for label in classes],
        "per_class50": [_mean(precision[_IOU_50, :, label, 0]) for label in classes],
    }


def voc_scores(
    detections: Sequence[Detections],
    targets: Sequence[ImageBoxes],
    num_classes: int,
    *,
    eleven_point: bool = False,
) -> dict[str, Any]:
    """Return Pascal VOC's average precision at an IoU of 0.5.

    A detection belongs to the object of its class that it overlaps most. The surest detection of
    an object is right, its others are wrong; detections of difficult objects are left out, and so
    are those of crowds, which VOC does not know. Neither counts as an object to be found.

    Args:
        detections: of each image, at least one.
        targets: the objects of the same images, in the same order.
        num_classes: labels are in 0..num_classes-1.
        eleven_point: mean precision at recall 0, 0.1 .. 1 (VOC 2007), rather than the whole area
            below the curve (VOC 2010 and later).

    Returns:
        "ap50", the mean over classes that have an object to be found, in 0..1, or None where no
        class has; "per_class", a list with None for the other classes.

    Raises:
        ValueError: detections and targets differ in number, or a label is not a class.

    Source: Everingham et al., The Pascal Visual Object Classes Challenge: A Retrospective (2015).
    """
    _check(detections, targets, num_classes)
    average = _eleven_point_area if eleven_point else _whole_area
    per_class = [
        average(right_D, objects) if objects else None
        for _, right_D, objects in _voc_matches(detections, targets, num_classes)
    ]
    found = [score for score in per_class if score is not None]
    return {"ap50": float(np.mean(found)) if found else None, "per_class": per_class}


class DetectionMeter:
    """Collects the detections of images, on any number of ranks, and scores them.

    The scores do not depend on the order of the images or on how they lie on the ranks.

    Args:
        num_classes: labels are in 0..num_classes-1.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        # rows of the images, and their detections: row, sides, label, score
        self._rows = torch.zeros(0, 1, dtype=torch.float64)
        self._found = torch.zeros(0, 7, dtype=torch.float64)
        self._batches: list[tuple[Tensor, Tensor]] = []

    def update(self, rows_B: Tensor, detections: Sequence[Detections]) -> None:
        """Add a batch.

        A detection with a side or score that is not finite is none.

        Args:
            rows_B: the images' rows in the table, integers (B,).
            detections: of each of them.
        """
        found = [_packed(row, of) for row, of in zip(rows_B.tolist(), detections, strict=True)]
        if found:
            self._batches.append((rows_B[:, None].cpu().double(), torch.cat(found)))

    def reduce(self, all_gather: Callable[[Tensor], Tensor]) -> None:
        """Add what the other ranks have; once, after the last batch.

        Args:
            all_gather: returns the rows of a float64 tensor (any number, F) of every rank, one
                below the other, on every rank.
        """
        self._rows, self._found = (all_gather(part) for part in self._joined())
        self._batches = []

    def compute(self, targets: Targets) -> dict[str, Any]:
        """Return the scores of all images that were added, each counted once.

        Args:
            targets: row -> the objects of that image.

        Returns:
            "count", the number of images; what ``coco_scores`` returns; and of ``voc_scores``
            "ap50_voc", "ap50_voc07" (at eleven points) and the list "per_class_voc".

        Raises:
            DataError: no image was added, or none of them has an object.
            RuntimeError: an image was added twice.
        """
        detections, objects = self._images(targets)
        scores = coco_scores(detections, objects, self.num_classes)
        if scores["map"] is None:
            raise DataError(f"none of the {len(objects)} images to score has an object")
        voc = voc_scores(detections, objects, self.num_classes)
        voc07 = voc_scores(detections, objects, self.num_classes, eleven_point=True)
        names = {"ap50_voc": voc["ap50"], "ap50_voc07": voc07["ap50"]}
        return {"count": len(objects), **scores, **names, "per_class_voc": voc["per_class"]}

    def confidences(self, targets: Targets) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return the scores of all detections, and which are right as ``voc_scores`` has it.

        Args:
            targets: row -> the objects of that image.

        Raises:
            DataError: no image was added.
            RuntimeError: an image was added twice.
        """
        matches = list(_voc_matches(*self._images(targets), self.num_classes))
        score, right, _ = zip(*matches)
        return np.concatenate(score), np.concatenate(right)

    def _images(self, targets: Targets) -> tuple[list[Detections], list[ImageBoxes]]:
        """Return detections and objects of every image that was added."""
        all_rows, found = (part.numpy() for part in self._joined())
        rows, counts = np.unique(all_rows[:, 0].astype(np.int64), return_counts=True)
        if not len(rows):
            raise DataError("there are no images to score")
        if counts.max() > 1:
            raise RuntimeError(f"row {rows[counts.argmax()]} was scored {counts.max()} times")
        return _unpacked(found, rows), [targets[row] for row in rows.tolist()]

    def _joined(self) -> tuple[Tensor, Tensor]:
        rows, found = zip((self._rows, self._found), *self._batches)
        return torch.cat(rows), torch.cat(found)


def _packed(row: int, detections: Detections) -> Tensor:
    """Return the finite detections of an image as rows of numbers, float64 (D, 7)."""
    columns = (np.full(len(detections), row), *detections.xyxy.T, detections.label)
    packed = np.stack([*columns, detections.score], axis=1, dtype=np.float64)
    return torch.from_numpy(packed[np.isfinite(packed).all(1)])


def _unpacked(found: NDArray[np.float64], rows: NDArray[np.int64]) -> list[Detections]:
    """Return the detections of each of the rows, which ascend; inside one they keep their order."""
    found = found[np.argsort(found[:, 0], kind="stable")]
    begins = np.searchsorted(found[:, 0], rows, "left")
    ends = np.searchsorted(found[:, 0], rows, "right")
    xyxy, label = found[:, 1:5].astype(np.float32), found[:, 5].astype(np.int64)
    score = found[:, 6].astype(np.float32)
    parts = (slice(begin, end) for begin, end in zip(begins, ends, strict=True))
    return [Detections(xyxy[part], label[part], score[part]) for part in parts]


def _check(
    detections: Sequence[Detections], targets: Sequence[ImageBoxes], num_classes: int
) -> None:
    """Raise ValueError where images do not pair up or a label is not a class."""
    if len(detections) != len(targets):
        raise ValueError(f"{len(detections)} images of detections, {len(targets)} of targets")
    for label in (*(of.label for of in detections), *(of.label for of in targets)):
        if len(label) and not 0 <= label.min() <= label.max() < num_classes:
            raise ValueError(f"labels are in 0..{num_classes - 1}; got {label.tolist()}")


def _mean(precision: NDArray[np.float64]) -> float | None:
    """Return the mean of COCO's precisions, where -1 stands for a class without objects."""
    known = precision[precision > -1]
    return float(known.mean()) if known.size else None


def _objects(targets: Sequence[ImageBoxes]) -> list[dict[str, Any]]:
    """Return the annotations of COCO's format; 0 is not a valid id there."""
    annotations: list[dict[str, Any]] = []
    for image, boxes in enumerate(targets):
        sides = _xywh(boxes.xyxy)
        columns = (sides.tolist(), sides[:, 2:].prod(1).tolist(), boxes.label.tolist())
        for box, area, label, crowd in zip(*columns, boxes.crowd.tolist(), strict=True):
            annotation = {"id": len(annotations) + 1, "image_id": image, "category_id": label}
            annotations.append(annotation | {"bbox": box, "area": area, "iscrowd": int(crowd)})
    return annotations


def _results(detections: Sequence[Detections]) -> list[dict[str, Any]]:
    """Return the results of COCO's format."""
    return [
        {"image_id": image, "category_id": label, "bbox": box, "score": score}
        for image, of in enumerate(detections)
        for box, label, score in zip(
            _xywh(of.xyxy).tolist(), of.label.tolist(), of.score.tolist(), strict=True
        )
    ]


def _xywh(xyxy: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the upper left corner, width and height of boxes."""
    corners = xyxy.astype(np.float64)
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)


def _voc_matches(
    detections: Sequence[Detections], targets: Sequence[ImageBoxes], num_classes: int
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.bool_], int]]:
    """Yield for each class the scores of its detections, which are right, and its objects' number.

    The surest comes first.

    Detections that are left out are not among them.
    """
    every = Boxes.of(targets).every
    left_out = every.difficult | every.crowd
    target_image = np.repeat(np.arange(len(targets)), [len(of) for of in targets])
    image = np.repeat(np.arange(len(detections)), [len(of) for of in detections])
    xyxy, label, score = (
        np.concatenate([getattr(of, name) for of in detections])
        for name in ("xyxy", "label", "score")
    )
    surest = np.argsort(-score, kind="stable")
    for number in range(num_classes):
        of_class = every.label == number
        chosen = surest[label[surest] == number]
        object_D = _most_overlapped(
            image[chosen], xyxy[chosen], target_image[of_class], every.xyxy[of_class]
        )
        hit_D = object_D >= 0
        ignored_D = hit_D.copy()
        ignored_D[hit_D] = left_out[of_class][object_D[hit_D]]
        right_D = np.zeros(len(chosen), dtype=bool)
        _, first = np.unique(object_D, return_index=True)
        right_D[first] = True
        counted_D = ~ignored_D
        objects = int((~left_out[of_class]).sum())
        yield score[chosen][counted_D], (right_D & hit_D)[counted_D], objects


def _most_overlapped(
    image_D: NDArray[np.int64],
    xyxy_D4: NDArray[np.float32],
    image_M: NDArray[np.int64],
    xyxy_M4: NDArray[np.float32],
) -> NDArray[np.int64]:
    """Return the object of its image that each detection overlaps most, -1 where it is too little.

    Args:
        image_D: image of each detection.
        xyxy_D4: its sides.
        image_M: image of each object, ascending.
        xyxy_M4: its sides.
    """
    begin_D = np.searchsorted(image_M, image_D, "left")
    count_D = np.searchsorted(image_M, image_D, "right") - begin_D
    detection_P = np.repeat(np.arange(len(image_D)), count_D)
    object_P = np.arange(len(detection_P)) + np.repeat(
        begin_D - count_D.cumsum() + count_D, count_D
    )
    iou_P = _iou(xyxy_D4[detection_P], xyxy_M4[object_P])
    # a later pair wins over an earlier one: the most overlapped object, the first of equal ones
    order = np.lexsort((-object_P, iou_P))
    order = order[iou_P[order] >= VOC_OVERLAP]
    object_D = np.full(len(image_D), -1)
    object_D[detection_P[order]] = object_P[order]
    return object_D


def _iou(first_P4: NDArray[np.float32], second_P4: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the intersection over union of pairs of boxes (P,); 0 where both have no area."""
    first_P4, second_P4 = first_P4.astype(np.float64), second_P4.astype(np.float64)
    begin_P2 = np.maximum(first_P4[:, :2], second_P4[:, :2])
    end_P2 = np.minimum(first_P4[:, 2:], second_P4[:, 2:])
    shared_P = (end_P2 - begin_P2).clip(min=0).prod(1)
    areas = ((sides[:, 2:] - sides[:, :2]).prod(1) for sides in (first_P4, second_P4))
    union_P = sum(areas) - shared_P
    return np.divide(shared_P, union_P, out=np.zeros_like(shared_P), where=union_P > 0)


def _precision_ahead(right_D: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return at each detection the best precision that is reached there or with more recall."""
    precision_D = right_D.cumsum() / np.arange(1, len(right_D) + 1)
    return np.maximum.accumulate(precision_D[::-1])[::-1]


def _whole_area(right_D: NDArray[np.bool_], objects: int) -> float:
    """Return the area below the curve: each right detection adds 1 / objects of recall."""
    return float(_precision_ahead(right_D)[right_D].sum() / objects)


def _eleven_point_area(right_D: NDArray[np.bool_], objects: int) -> float:
    """Return the mean of the best precision at a recall of 0, 0.1 .. 1 or more."""
    # in whole numbers, recall * 10 * objects, so that a recall of 3 / 10 reaches 0.3
    place = np.searchsorted(10 * right_D.cumsum(), np.arange(11) * objects)
    return float(np.append(_precision_ahead(right_D), 0.0)[place].sum() / 11)
