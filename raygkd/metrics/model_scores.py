"""Scores, confusion matrix and calibration of the outputs of a finished model.

Shapes: B batch, K classes, D most detections of an image, N images.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raygkd.data.boxes import Boxes
from raygkd.data.spec import ImageSpec
from raygkd.errors import DataError
from raygkd.metrics.calibration import calibration
from raygkd.metrics.classification import ClassificationMeter
from raygkd.metrics.detection import DetectionMeter, Detections
from raygkd.metrics.metric import RegisteredMeter

# the least score of a detection whose confidence is looked at
SURE = 0.3


class OutputMeter:
    """Adds up the outputs of ``raygkd.deploy.modules.Run`` for batches of images, and scores them.

    Args:
        spec: of the images.
        boxes: of every image of the table, where it is for detection.
    """

    def __init__(self, spec: ImageSpec, boxes: Boxes | None):
        self._spec, self._boxes, classes = spec, boxes, len(spec.class_names)
        self._classes = ClassificationMeter(classes)
        self._found = DetectionMeter(classes)
        task = "classification" if boxes is None else "detection"
        self._registered = RegisteredMeter(task, classes)
        # label, answer and confidence of every image
        self._answers: list[tuple[NDArray, NDArray, NDArray]] = []

    def update(self, output: Tensor, batch: Mapping[str, Tensor]) -> None:
        """Add a batch.

        Args:
            output: logits (B, K), or detections (B, D, 6).
            batch: the arrays of a ``Window`` that the images came with.
        """
        if self._boxes is None:
            label_B = batch["label"]
            self._classes.update(output, label_B)
            self._registered.update(output, label_B)
            confidence_B, answer_B = output.softmax(1).max(1)
            self._answers.append((label_B.numpy(), answer_B.numpy(), confidence_B.numpy()))
            return
        found = [of_D6[of_D6[:, 4] >= 0].numpy() for of_D6 in output]
        detections = [
            Detections(of[:, :4] / ratio, of[:, 5].astype(np.int64), of[:, 4])
            for of, ratio in zip(found, batch["ratio"].tolist())
        ]
        self._found.update(batch["row"], detections)
        truth = [self._boxes[row] for row in batch["row"].tolist()]
        self._registered.update(detections, truth)

    def score(self) -> float | None:
        """Return the score by which models are ranked; None if no image has an object."""
        try:
            return self._scores()["score"]
        except DataError:
            if self._boxes is None:
                raise
            return None

    def _scores(self) -> dict[str, Any]:
        """Return "score", and all measures that it may be."""
        if self._boxes is None:
            scores = self._classes.compute()
            # which is a registered metric as well
            del scores["accuracy"]
        else:
            scores = self._found.compute(self._boxes)
        scores = self._registered.added_to(scores)
        return {"score": scores[self._spec.score], **scores}

    def compute(self) -> dict[str, Any]:
        """Return scores, calibration and confusion matrix.

        Returns:
            "scores": "score", the result of ``ClassificationMeter.compute`` or
            ``DetectionMeter.compute`` with its lists by class, and the registered metrics;
            "calibration": see ``calibration``, of all predictions of a classifier, or of the
            detections with a score of at least ``SURE``, which are right at an IoU of 0.5;
            "confusion": for a classifier, K lists of K counts, a list per true class, a count per
            predicted class; otherwise None.

        Raises:
            DataError: there are no images, or none has an object.
        """
        scores = self._scores()
        if self._boxes is not None:
            score_N, right_N = self._found.confidences(self._boxes)
            return {
                "scores": scores,
                "calibration": calibration(score_N[score_N >= SURE], right_N[score_N >= SURE]),
                "confusion": None,
            }
        label_N, answer_N, confidence_N = map(np.concatenate, zip(*self._answers))
        classes = len(self._spec.class_names)
        pairs = np.bincount(label_N * classes + answer_N, minlength=classes * classes)
        return {
            "scores": scores,
            "calibration": calibration(confidence_N, label_N == answer_N),
            "confusion": pairs.reshape(classes, classes).tolist(),
        }


def as_tensors(batch: Mapping[str, NDArray]) -> dict[str, Tensor]:
    """Return the arrays of a ``Window`` as an ``OutputMeter`` takes them."""
    return {name: torch.from_numpy(np.array(array)) for name, array in batch.items()}
