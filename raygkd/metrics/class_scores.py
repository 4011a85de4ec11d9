"""Scores of classifiers by name, which models can be ranked by (``--score``).

Shapes: B batch, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from raygkd.metrics.classification import topk_correct
from raygkd.metrics.metric import Metric
from raygkd.registry import METRICS


@METRICS.register("accuracy")
class Accuracy(Metric):
    """Fraction of images classified correctly."""

    title = "accuracy"

    def sums(self, output: Tensor, truth: Tensor) -> Tensor:
        """Return the numbers of right answers and of images."""
        right = topk_correct(output, truth, [1])[1]
        return torch.stack([right, right.new_tensor(len(truth))])


@METRICS.register("balanced-accuracy")
class BalancedAccuracy(Metric):
    """Mean over the classes of the fraction of their images classified correctly.

    Classes without images are left out.
    """

    title = "balanced accuracy"

    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        self.size = 2 * num_classes

    def sums(self, output: Tensor, truth: Tensor) -> Tensor:
        """Return the numbers of right answers, then of images, by class."""
        right_K, _, count_K = _counts(output, truth)
        return torch.cat([right_K, count_K])

    def value(self, sums: Tensor) -> float:
        """Return the mean of the quotients."""
        right_K, count_K = sums.split(self.num_classes)
        known_K = count_K > 0
        return float((right_K[known_K] / count_K[known_K]).mean())


@METRICS.register("macro-f1")
class MacroF1(Metric):
    """Mean over the classes of F1, the harmonic mean of precision and recall.

    Classes that are neither an image's nor an answer are left out.
    """

    title = "macro F1"

    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        self.size = 3 * num_classes

    def sums(self, output: Tensor, truth: Tensor) -> Tensor:
        """Return the numbers of right answers, then of answers, then of images, by class."""
        return torch.cat(_counts(output, truth))

    def value(self, sums: Tensor) -> float:
        """Return the mean of twice the right answers over answers and images."""
        right_K, said_K, count_K = sums.split(self.num_classes)
        both_K = said_K + count_K
        known_K = both_K > 0
        return float((2 * right_K[known_K] / both_K[known_K]).mean())


@METRICS.register("log-loss")
class LogLoss(Metric):
    """Mean cross-entropy of the labels, in nats."""

    title = "log loss"
    higher_is_better = False

    def sums(self, output: Tensor, truth: Tensor) -> Tensor:
        """Return the sum of the cross-entropies, and the number of images."""
        total = F.cross_entropy(output.double(), truth, reduction="sum")
        return torch.stack([total, total.new_tensor(len(truth))])


def _counts(logits_BK: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the numbers of right answers, of answers and of images by class, (K,) each.

    A row with a NaN counts as no prediction.
    """
    num_classes = logits_BK.shape[1]
    whole_B = ~logits_BK.isnan().any(1)
    answer_B = logits_BK.argmax(1)
    chosen = (labels_B[whole_B & (answer_B == labels_B)], answer_B[whole_B], labels_B)
    right_K, said_K, count_K = (torch.bincount(of, minlength=num_classes) for of in chosen)
    return right_K, said_K, count_K
