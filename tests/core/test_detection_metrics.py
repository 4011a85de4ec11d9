"""Scores of detectors against pycocotools, hand-worked cases and plain loops."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from raygkd.data.boxes import Boxes, ImageBoxes
from raygkd.errors import DataError
from raygkd.metrics.detection import DetectionMeter, Detections, coco_scores, voc_scores

Sides = Sequence[float]
CLASSES = 4
COCO_NAMES = ("map", "map50", "map75", "map_small", "map_medium", "map_large")


def objects(
    xyxy: Sequence[Sides],
    label: list[int] | None = None,
    difficult: list[int] | None = None,
    crowd: list[int] | None = None,
) -> ImageBoxes:
    none = [0] * len(xyxy)
    return ImageBoxes(
        np.array(xyxy, np.float32).reshape(-1, 4),
        np.array(label or none, np.int64),
        np.array(difficult or none, bool),
        np.array(crowd or none, bool),
    )


def found(xyxy: Sequence[Sides], score: list[float], label: list[int] | None = None) -> Detections:
    return Detections(
        np.array(xyxy, np.float32).reshape(-1, 4),
        np.array(label or [0] * len(xyxy), np.int64),
        np.array(score, np.float32),
    )


def random_scenes(
    seed: int, images: int = 30, *, crowds: bool = True
) -> tuple[list[Detections], list[ImageBoxes]]:
    """Return detections that are moved copies of the objects, some missed, double or made up.

    Sizes are small, medium and large; scores have ties; some images hold nothing. The last class
    is never detected, and the one before has no objects.
    """
    rng = np.random.default_rng(seed)
    detections, targets = [], []
    for image in range(images):
        number = 0 if image % 7 == 0 else int(rng.integers(1, 12))
        corner, size = rng.uniform(0, 300, (number, 2)), np.exp(rng.uniform(2.3, 5.3, (number, 2)))
        xyxy = np.concatenate([corner, corner + size], 1).astype(np.float32)
        label = rng.choice([0, 1, 3], number)
        flags = rng.random((2, number)) < 0.15
        targets.append(ImageBoxes(xyxy, label, flags[0], flags[1] & crowds))
        source = rng.integers(0, max(number, 1), 0 if image % 5 == 1 else 3 * number)
        moved = xyxy[source] + rng.normal(0, 0.12, (len(source), 4)) * np.tile(size[source], 2)
        made_up = rng.uniform(0, 300, (2, 2))
        boxes = np.concatenate([moved, np.concatenate([made_up, made_up + 50], 1)])
        guess = np.where(rng.random(len(boxes)) < 0.8, [*label[source], 0, 1], 2)
        guess[guess == 3] = rng.choice([1, 0], (guess == 3).sum())
        detections.append(
            Detections(
                boxes.astype(np.float32),
                guess.astype(np.int64),
                (rng.integers(1, 20, len(boxes)) / 20).astype(np.float32),
            )
        )
    return detections, targets


# COCO


def pycocotools_scores(
    detections: list[Detections], targets: list[ImageBoxes], classes: int
) -> dict[str, Any]:
    """Return the twelve numbers' first six, and precision by class, of pycocotools."""
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image, (of_image, boxes) in enumerate(zip(detections, targets, strict=True), start=1):
        for m in range(len(boxes)):
            x0, y0, x1, y1 = map(float, boxes.xyxy[m])
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": int(boxes.label[m]) + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": int(boxes.crowd[m]),
                }
            )
        for d in range(len(of_image)):
            x0, y0, x1, y1 = map(float, of_image.xyxy[d])
            results.append(
                {
                    "image_id": image,
                    "category_id": int(of_image.label[d]) + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "score": float(of_image.score[d]),
                }
            )
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": image} for image in range(1, len(targets) + 1)],
            "categories": [{"id": label} for label in range(1, classes + 1)],
            "annotations": annotations,
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    scores = dict(zip(COCO_NAMES, evaluation.stats[:6].tolist(), strict=True))
    scores["per_class"] = precision.mean((0, 1)).tolist()
    scores["per_class50"] = precision[0].mean(0).tolist()
    return scores


def without_none(value: Any) -> Any:
    """Return scores as pycocotools writes them, with -1 for None."""
    if isinstance(value, list):
        return [without_none(part) for part in value]
    return -1.0 if value is None else value


@pytest.mark.parametrize("seed", range(5))
def test_coco_scores_equal_those_of_pycocotools(seed: int) -> None:
    detections, targets = random_scenes(seed)
    scores = coco_scores(detections, targets, CLASSES)
    expected = pycocotools_scores(detections, targets, CLASSES)
    assert scores.keys() == expected.keys()
    for name, value in expected.items():
        assert without_none(scores[name]) == pytest.approx(value, abs=1e-12), name
    assert 0.05 < scores["map"] < scores["map50"] < 1
    assert scores["per_class"][2] is None
    assert scores["per_class"][3] == 0


def test_more_than_a_hundred_detections_of_an_image_are_cut_as_by_pycocotools() -> None:
    targets = [objects([[0, 0, 10, 10]])]
    boxes = [[20.0, 20, 30, 30]] * 100 + [[0.0, 0, 10, 10]]
    detections = [found(boxes, np.linspace(1, 0.1, 101).tolist())]
    assert coco_scores(detections, targets, 1)["map"] == 0
    assert pycocotools_scores(detections, targets, 1)["map"] == 0


def test_sizes_without_objects_have_no_score() -> None:
    target = objects([[0, 0, 10, 10]])
    scores = coco_scores([found([[0, 0, 10, 10]], [0.5])], [target], 2)
    assert scores == {
        **dict.fromkeys(("map", "map50", "map75", "map_small"), 1.0),
        **dict.fromkeys(("map_medium", "map_large")),
        "per_class": [1.0, None],
        "per_class50": [1.0, None],
    }


def test_crowds_are_not_to_be_found_and_difficult_objects_are_for_coco() -> None:
    small, large = [0, 0, 10, 10], [100, 100, 300, 300]
    inside_crowd = [120, 120, 180, 180]
    detections = [found([small, inside_crowd], [0.5, 0.9])]
    crowd = objects([small, large], crowd=[0, 1])
    assert coco_scores(detections, [crowd], 1)["map"] == 1.0
    difficult = objects([small, large], difficult=[0, 1])
    assert coco_scores(detections, [difficult], 1)["map"] == pytest.approx(0.25, abs=0.01)


# Pascal VOC


def test_voc_scores_equal_a_hand_worked_case() -> None:
    """Four objects to be found and a difficult one, in two images; seven detections.

    score   what it is                          right   precision   recall
    0.95    on A                                yes     1/1         1/4
    0.90    on the difficult object             left out
    0.85    on A again, a duplicate             no      1/2         1/4
    0.80    on B, IoU exactly 0.5               yes     2/3         2/4
    0.70    beside everything                   no      2/4         2/4
    0.60    on C, in the second image           yes     3/5         3/4
    0.50    where A is, in the second image     no      3/6         3/4

    Best precision from there on: 1 up to recall 1/4, 2/3 up to 2/4, 3/5 up to 3/4, then 0.
    Area: (1 + 2/3 + 3/5) / 4 = 17/30. At eleven points: recall 0, 0.1, 0.2 have 1, recall 0.3,
    0.4, 0.5 have 2/3, recall 0.6, 0.7 have 3/5, the other three 0: (3 + 2 + 6/5) / 11 = 31/55.
    """
    a, b, c, hard = [0, 0, 40, 40], [100, 0, 140, 40], [50, 50, 90, 70], [0, 100, 40, 140]
    missed = [100, 100, 140, 140]
    first = objects([a, b, hard], difficult=[0, 0, 1])
    second = objects([c, missed])
    half_of_b, almost_a = [100, 0, 120, 40], [1, 1, 40, 40]
    detections = [
        found([half_of_b, almost_a, hard, [60, 60, 90, 90], a], [0.80, 0.85, 0.90, 0.70, 0.95]),
        found([a, c], [0.50, 0.60]),
    ]
    whole = voc_scores(detections, [first, second], 2)
    assert whole == {"ap50": pytest.approx(17 / 30), "per_class": [whole["ap50"], None]}
    eleven = voc_scores(detections, [first, second], 2, eleven_point=True)
    assert eleven == {"ap50": pytest.approx(31 / 55), "per_class": [eleven["ap50"], None]}


def plain_overlap(a: Sides, b: Sides) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def plain_voc(
    detections: list[Detections], targets: list[ImageBoxes], label: int, *, eleven_point: bool
) -> float | None:
    """Return the average precision of a class as the VOC devkit goes about it, in plain loops."""
    ranked = [
        (-float(of.score[d]), image, d)
        for image, of in enumerate(detections)
        for d in range(len(of))
        if of.label[d] == label
    ]
    number = sum(int((of.label == label)[~(of.difficult | of.crowd)].sum()) for of in targets)
    if not number:
        return None
    claimed: set[tuple[int, int]] = set()
    curve, right, wrong = [], 0, 0
    for _, image, d in sorted(ranked):
        of, best, best_overlap = targets[image], -1, 0.0
        for m in range(len(of)):
            overlap = plain_overlap(detections[image].xyxy[d].tolist(), of.xyxy[m].tolist())
            if of.label[m] == label and overlap > best_overlap:
                best, best_overlap = m, overlap
        if best_overlap >= 0.5 and (of.difficult[best] or of.crowd[best]):
            continue
        if best_overlap >= 0.5 and (image, best) not in claimed:
            claimed.add((image, best))
            right += 1
        else:
            wrong += 1
        curve.append((right, right / (right + wrong)))
    if eleven_point:
        reached = [
            max((p for r, p in curve if 10 * r >= point * number), default=0.0)
            for point in range(11)
        ]
        return sum(reached) / 11
    steps = [max((p for r, p in curve if r >= k), default=0.0) for k in range(1, number + 1)]
    return sum(steps) / number


@pytest.mark.parametrize("eleven_point", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_voc_scores_equal_those_of_plain_loops(seed: int, eleven_point: bool) -> None:
    detections, targets = random_scenes(seed)
    scores = voc_scores(detections, targets, CLASSES, eleven_point=eleven_point)
    expected = [
        plain_voc(detections, targets, label, eleven_point=eleven_point) for label in range(CLASSES)
    ]
    assert without_none(scores["per_class"]) == pytest.approx(without_none(expected), abs=1e-12)
    known = [value for value in expected if value is not None]
    assert scores["ap50"] == pytest.approx(sum(known) / len(known), abs=1e-12)
    assert 0.05 < scores["ap50"] < 1
    assert expected[2] is None
    assert expected[3] == 0


def test_a_recall_of_three_tenths_reaches_the_point_of_it() -> None:
    boxes = [[20.0 * place, 0, 20.0 * place + 10, 10] for place in range(10)]
    detections = [found(boxes[:3], [0.9, 0.8, 0.7])]
    scores = voc_scores(detections, [objects(boxes)], 1, eleven_point=True)
    assert scores["ap50"] == pytest.approx(4 / 11)


def test_equal_scores_are_ordered_by_image_and_place() -> None:
    box, other = [0.0, 0, 10, 10], [50.0, 50, 60, 60]
    targets = [objects([box]), objects([])]
    right_first = [found([box, other], [0.5, 0.5]), found([other], [0.5])]
    assert voc_scores(right_first, targets, 1)["ap50"] == 1
    right_second = [found([other, box], [0.5, 0.5]), found([other], [0.5])]
    assert voc_scores(right_second, targets, 1)["ap50"] == 0.5
    assert voc_scores(right_second[::-1], targets[::-1], 1)["ap50"] == pytest.approx(1 / 3)


def test_a_detection_belongs_to_the_object_it_overlaps_most_or_else_to_the_first() -> None:
    left, right = [0, 0, 10, 10], [1, 0, 11, 10]
    detections = [found([right], [0.5])]
    for boxes, difficult, score in [
        ([left, right], [0, 1], 0.0),
        ([right, left], [1, 0], 0.0),
        ([left, right], [1, 0], 1.0),
        ([right, right], [0, 1], 1.0),
        ([right, right], [1, 0], 0.0),
    ]:
        assert voc_scores(detections, [objects(boxes, None, difficult)], 1)["ap50"] == score


def test_boxes_without_area_overlap_nothing() -> None:
    point = [5, 5, 5, 5]
    with np.errstate(all="raise"):
        scores = voc_scores([found([point], [0.5])], [objects([point])], 1)
    assert scores["ap50"] == 0


# both


def test_perfect_detections_score_one() -> None:
    _, targets = random_scenes(0, crowds=False)
    detections = [
        Detections(of.xyxy, of.label, np.linspace(1, 0.5, len(of)).astype(np.float32))
        for of in targets
    ]
    scores = coco_scores(detections, targets, CLASSES)
    assert {scores[name] for name in COCO_NAMES} == {1.0}
    for eleven_point in (False, True):
        scores = voc_scores(detections, targets, CLASSES, eleven_point=eleven_point)
        assert scores == {"ap50": 1.0, "per_class": [1.0, 1.0, None, 1.0]}


def test_no_detections_score_zero() -> None:
    nothing = [found([], []), found([], [])]
    targets = [objects([[0, 0, 10, 10]]), objects([])]
    assert coco_scores(nothing, targets, 2) == {
        **dict.fromkeys(("map", "map50", "map75", "map_small"), 0.0),
        **dict.fromkeys(("map_medium", "map_large")),
        "per_class": [0.0, None],
        "per_class50": [0.0, None],
    }
    assert voc_scores(nothing, targets, 2) == {"ap50": 0.0, "per_class": [0.0, None]}


def test_without_objects_there_is_no_score() -> None:
    detections, targets = [found([[0, 0, 10, 10]], [0.5])], [objects([])]
    assert coco_scores(detections, targets, 1)["map"] is None
    assert voc_scores(detections, targets, 1) == {"ap50": None, "per_class": [None]}


@pytest.mark.parametrize("scores", [coco_scores, voc_scores])
def test_labels_that_are_no_class_and_unpaired_images_are_refused(scores: Any) -> None:
    box = [0, 0, 10, 10]
    with pytest.raises(ValueError, match=r"labels are in 0\.\.1; got \[2\]"):
        scores([found([box], [0.5], [2])], [objects([box])], 2)
    with pytest.raises(ValueError, match=r"labels are in 0\.\.1; got \[0, -1\]"):
        scores([found([box], [0.5])], [objects([box, box], [0, -1])], 2)
    with pytest.raises(ValueError, match="1 images of detections, 2 of targets"):
        scores([found([box], [0.5])], [objects([box])] * 2, 2)


# the meter


def meter_of(detections: list[Detections], rows: list[int], batch_size: int = 4) -> DetectionMeter:
    meter = DetectionMeter(CLASSES)
    for begin in range(0, len(rows), batch_size):
        batch = rows[begin : begin + batch_size]
        meter.update(torch.tensor(batch), [detections[row] for row in batch])
    return meter


def keep_call(calls: list[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return an all_gather that notes what it is given."""
    return lambda part: calls.append(part) or part  # type: ignore[func-returns-value]


def give_back(gathered: list[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return an all_gather that returns what all ranks have, call by call."""
    parts = iter(gathered)
    return lambda _: next(parts)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_scores_are_the_same_on_any_number_of_ranks_and_in_any_order(ranks: int) -> None:
    detections, targets = random_scenes(1)
    expected = coco_scores(detections, targets, CLASSES)
    voc = voc_scores(detections, targets, CLASSES)
    voc07 = voc_scores(detections, targets, CLASSES, eleven_point=True)
    names = {"ap50_voc": voc["ap50"], "ap50_voc07": voc07["ap50"], "count": len(targets)}
    expected |= {**names, "per_class_voc": voc["per_class"]}
    order = np.random.default_rng(0).permutation(len(targets)).tolist()
    shares = [order[rank::ranks] for rank in range(ranks)]
    # what each rank sends, call by call
    sent: list[list[torch.Tensor]] = []
    for share in shares:
        calls: list[torch.Tensor] = []
        meter_of(detections, share).reduce(keep_call(calls))
        sent.append(calls)
    gathered = [torch.cat(parts) for parts in zip(*sent, strict=True)]
    assert {part.dtype for part in gathered} == {torch.float64}
    for share in shares:
        meter = meter_of(detections, share)
        meter.reduce(give_back(gathered))
        assert meter.compute(Boxes.of(targets)) == expected


def test_images_without_detections_count() -> None:
    box = [0, 0, 10, 10]
    targets = {3: objects([box]), 8: objects([box])}
    meter = DetectionMeter(1)
    meter.update(torch.tensor([8]), [found([], [])])
    meter.update(torch.tensor([3]), [found([box], [0.5])])
    meter.update(torch.tensor([], dtype=torch.int64), [])
    scores = meter.compute(targets)
    assert scores["count"] == 2
    assert scores["ap50_voc"] == 0.5


def test_confidences_come_with_being_right() -> None:
    box, other = [0, 0, 10, 10], [20, 20, 30, 30]
    targets = {3: objects([box, other], [0, 1]), 8: objects([box])}
    meter = DetectionMeter(2)
    # the second of an object is wrong, and so is one of another class
    meter.update(torch.tensor([3]), [found([box, box, other], [0.6, 0.9, 0.8], [0, 0, 0])])
    meter.update(torch.tensor([8]), [found([box, other], [0.7, 0.5], [0, 1])])
    score, right = meter.confidences(targets)
    assert dict(zip(score.tolist(), right.tolist(), strict=True)) == pytest.approx(
        dict(zip(np.float32([0.9, 0.8, 0.7, 0.6, 0.5]).tolist(), [1, 0, 1, 0, 0], strict=True))
    )


def test_detections_that_are_not_finite_are_none() -> None:
    box, nan = [0.0, 0, 10, 10], float("nan")
    meter = DetectionMeter(1)
    meter.update(
        torch.tensor([0]),
        [found([box, [0, 0, nan, 10], [0, 0, 10, float("inf")], box], [nan, 0.9, 0.8, 0.5])],
    )
    scores = meter.compute({0: objects([box])})
    assert scores["map"] == scores["ap50_voc"] == 1


def test_an_image_that_is_scored_twice_is_an_error() -> None:
    meter = DetectionMeter(1)
    meter.update(torch.tensor([5, 2, 5]), [found([], [])] * 3)
    with pytest.raises(RuntimeError, match="row 5 was scored 2 times"):
        meter.compute({2: objects([]), 5: objects([])})


def test_meter_without_images_or_objects_says_so() -> None:
    meter = DetectionMeter(1)
    with pytest.raises(DataError, match="no images to score"):
        meter.compute({})
    meter.update(torch.tensor([0]), [found([], [])])
    with pytest.raises(DataError, match="none of the 1 images to score has an object"):
        meter.compute({0: objects([])})
