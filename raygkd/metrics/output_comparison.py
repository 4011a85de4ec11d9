"""How far the outputs of two copies of a model are apart.

Shapes: B batch, S side of the square input, K classes, D most detections of an image, E and G
detections of the one and the other, 4 the sides of a box (x0, y0, x1, y1) in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

from raygkd.models.detectors import MOST_DETECTIONS, SCORE_THRESHOLD

# largest difference of logits, of scores, and of the sides of boxes as shares of S
TOLERANCE = 1e-4
# share of the detections that may have none beside them: where two overlap just as much as is
# allowed, or have one score, the last bit decides which of them stays
MOST_ALONE = 0.01
# detections are the same object's up to this difference, measured as above
_SAME = 0.02
# what is shown of detections, and the overlap of those of one object
_SHOWN, _OVERLAP = 0.3, 0.5


@dataclass(kw_only=True)
class Comparison:
    """The difference of outputs, over all batches added.

    Attributes:
        images: how many.
        largest: difference of logits; or of scores, and of sides as shares of S, of the detections
            that belong together.
        detections: how many of them there are, in both together.
        alone: how many of those have none beside them.
    """

    images: int = 0
    largest: float = 0.0
    detections: int = 0
    alone: int = 0

    @property
    def is_equal(self) -> bool:
        """Whether the outputs are equal up to rounding."""
        return self.largest <= TOLERANCE and self.alone <= MOST_ALONE * self.detections

    def add(self, first: Tensor, second: Tensor, side: int | None) -> None:
        """Add a batch.

        Args:
            first: logits (B, K), or detections (B, D, 6) as of ``DeployedDetector``.
            second: of the same images.
            side: S, of detections; None for logits.
        """
        self.images += len(first)
        if side is None:
            self._widen((first - second).abs().max())
            return
        for one_D6, other_D6 in zip(first, second, strict=True):
            self._add_detections(one_D6, other_D6, side)

    def _widen(self, difference: Tensor) -> None:
        # NaN is a large difference
        value = float(difference.nan_to_num(nan=float("inf")))
        self.largest = max(self.largest, value)

    def _add_detections(self, one_D6: Tensor, other_D6: Tensor, side: int) -> None:
        one_E6, other_G6 = one_D6[one_D6[:, 4] >= 0], other_D6[other_D6[:, 4] >= 0]
        scale_5 = torch.tensor([side, side, side, side, 1.0])
        apart_EG = (
            ((one_E6[:, None, :5] - other_G6[None, :, :5]) / scale_5).abs().amax(2)
            if len(one_E6) and len(other_G6)
            else torch.empty(len(one_E6), len(other_G6))
        )
        apart_EG = apart_EG.masked_fill(one_E6[:, None, 5] != other_G6[None, :, 5], float("inf"))
        found_E, found_G = (torch.zeros(len(of), dtype=torch.bool) for of in (one_E6, other_G6))
        for number, apart_G in enumerate(apart_EG):
            free_G = apart_G.masked_fill(found_G, float("inf"))
            if len(free_G) and free_G.min() <= _SAME:
                found_E[number] = found_G[free_G.argmin()] = True
                self._widen(free_G.min())
        self.detections += len(one_E6) + len(other_G6)
        for of, found in ((one_E6, found_E), (other_G6, found_G)):
            # the last bit also decides which of two nearly equal ones is over the threshold
            least = of[:, 4].min() if len(of) == MOST_DETECTIONS else SCORE_THRESHOLD
            self.alone += int((~found & (of[:, 4] > least + TOLERANCE)).sum())


@dataclass(kw_only=True)
class Agreement:
    """How often two models say the same, over all batches added.

    Attributes:
        same: images with the same class; or pairs of detections with a score of 0.3 or more, of
            the same class, that overlap by half (IoU).
        of: images; or the mean of both models' numbers of such detections.
    """

    same: float = 0.0
    of: float = 0.0

    @property
    def share(self) -> float | None:
        """``same`` of ``of``, in 0..1; None where there is nothing to compare."""
        return self.same / self.of if self.of else None

    def add(self, first: Tensor, second: Tensor) -> None:
        """Add a batch: logits (B, K), or detections (B, D, 6) as of ``DeployedDetector``."""
        if first.ndim == 2:
            self.same += int((first.argmax(1) == second.argmax(1)).sum())
            self.of += len(first)
            return
        for one_D6, other_D6 in zip(first, second, strict=True):
            one_E6, other_G6 = one_D6[one_D6[:, 4] >= _SHOWN], other_D6[other_D6[:, 4] >= _SHOWN]
            overlap_EG = box_iou(one_E6[:, :4], other_G6[:, :4])
            overlap_EG[one_E6[:, None, 5] != other_G6[None, :, 5]] = 0.0
            free_G = torch.ones(len(other_G6), dtype=torch.bool)
            for overlap_G in overlap_EG:
                best = (overlap_G * free_G).max(0) if len(free_G) else None
                if best is not None and best.values >= _OVERLAP:
                    free_G[best.indices] = False
            self.same += int((~free_G).sum())
            self.of += (len(one_E6) + len(other_G6)) / 2
