"""Classification scores, summed so that they are exact over any number of batches and ranks.

Shapes: B batch, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raygkd.errors import DataError


def topk_correct(logits_BK: Tensor, labels_B: Tensor, ks: Iterable[int]) -> dict[int, Tensor]:
    """Return k -> number of rows whose label is among the k largest logits (integer scalars).

    Labels are int64 in 0..K-1.

    Of equal logits the lower class comes first, as in argmax, so that a constant output does not
    count as right. A row with a NaN is wrong.

    Raises:
        ValueError: a k that is not in 1..K.
    """
    rank_B = _label_rank(logits_BK, labels_B)
    return {k: (rank_B < _checked(k, logits_BK.shape[1])).sum() for k in ks}


class ClassificationMeter:
    """Adds up batches of logits and gives accuracy, loss and accuracy by class.

    All sums are in one float64 tensor: images, right at 1, right at min(5, K), loss, then K numbers
    of right images and K numbers of images by class.

    Args:
        num_classes: K.
        device: of the sums; that of the logits saves copies.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        self.num_classes = num_classes
        self._sums = torch.zeros(4 + 2 * num_classes, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, logits_BK: Tensor, labels_B: Tensor) -> None:
        """Add a batch, which may be empty; labels are int64 in 0..K-1."""
        rank_B = _label_rank(logits_BK, labels_B)
        right_B = (rank_B < 1).double()
        right_at_5_B = (rank_B < min(5, self.num_classes)).double()
        loss_B = F.cross_entropy(logits_BK.double(), labels_B, reduction="none")
        ones_B = torch.ones_like(right_B)
        totals = torch.stack([part_B.sum() for part_B in (ones_B, right_B, right_at_5_B, loss_B)])
        right_K = totals.new_zeros(self.num_classes).index_add_(0, labels_B, right_B)
        count_K = totals.new_zeros(self.num_classes).index_add_(0, labels_B, ones_B)
        self._sums += torch.cat([totals, right_K, count_K]).to(self._sums.device)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums so far."""
        return {"sums": self._sums}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the result of ``state_dict``."""
        self._sums = state["sums"].to(self._sums.device)

    def reduce(self, all_sum: Callable[[Tensor], Tensor]) -> None:
        """Replace the sums by those of all ranks; once, after the last batch.

        Args:
            all_sum: returns the sum of a float64 tensor over the ranks, on every rank.
        """
        self._sums = all_sum(self._sums)

    def compute(self) -> dict[str, Any]:
        """Return the scores of all images added.

        "count" is their number; "accuracy" and, where K > 5, "top5" are shares in 0..1; "loss" is
        the mean cross-entropy in nats, NaN where a logit was; "per_class" is a list of K shares,
        None for a class without images.

        Raises:
            DataError: no image was added.
        """
        totals, right_K, count_K = self._sums.cpu().split([4, self.num_classes, self.num_classes])
        count, right, right_at_5, loss = totals.tolist()
        if not count:
            raise DataError("there are no images to score")
        scores: dict[str, Any] = {"count": int(count), "accuracy": right / count}
        if self.num_classes > 5:
            scores["top5"] = right_at_5 / count
        scores["loss"] = loss / count
        scores["per_class"] = [
            class_right / class_count if class_count else None
            for class_right, class_count in zip(right_K.tolist(), count_K.tolist(), strict=True)
        ]
        return scores


def _label_rank(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Return how many classes come before the label's, (B,); K where a row has a NaN."""
    num_classes = logits_BK.shape[1]
    classes_K = torch.arange(num_classes, device=logits_BK.device)
    labels_B1 = labels_B[:, None]
    label_logit_B1 = logits_BK.gather(1, labels_B1)
    ahead_BK = (logits_BK > label_logit_B1) | (
        (logits_BK == label_logit_B1) & (classes_K < labels_B1)
    )
    broken_B = logits_BK.isnan().any(1)
    return ahead_BK.sum(1).masked_fill(broken_B, num_classes)


def _checked(k: int, num_classes: int) -> int:
    if not 1 <= k <= num_classes:
        raise ValueError(f"k must be from 1 to {num_classes}, the number of classes; got {k}")
    return k
