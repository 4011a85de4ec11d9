"""The loss of a classifier on its labels.

Shapes: B batch, K classes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class LabelLoss(nn.Module):
    """Cross-entropy, averaged over the images of a batch.

    With class weights, an image's loss is multiplied by the weight of its class, and the mean is
    still over the images: a batch in parts has the same loss as the whole.

    Args:
        smoothing: share of each label that is spread evenly over all classes.
        class_weights_K: weight of each class (K,); None for 1.
        partly: some images have no label; the mean is over the others, and 0 without any.
    """

    class_weights_K: Tensor | None

    def __init__(
        self,
        smoothing: float = 0.0,
        class_weights_K: Tensor | None = None,
        *,
        partly: bool = False,
    ):
        super().__init__()
        self.smoothing, self.partly = smoothing, partly
        self.register_buffer("class_weights_K", class_weights_K)

    def forward(self, logits_BK: Tensor, targets: Tensor) -> Tensor:
        """Return the loss in nats (scalar), in full precision.

        Args:
            logits_BK: class scores.
            targets: class of each image (B,), or of mixed images the share of each class (B, K).
                An image without a label has class -1, or shares that are 0; one that is mixed with
                such an image has shares whose sum is below 1, and counts with that sum.
        """
        if self.partly:
            return self._mean_over_labelled(logits_BK.float(), targets)
        loss = F.cross_entropy(
            logits_BK.float(),
            targets,
            weight=self.class_weights_K,
            reduction="mean" if self.class_weights_K is None else "sum",
            label_smoothing=self.smoothing,
        )
        # torch's weighted mean divides by the sum of the weights for classes, but not for shares
        return loss if self.class_weights_K is None else loss / len(logits_BK)

    def _mean_over_labelled(self, logits_BK: Tensor, targets: Tensor) -> Tensor:
        if targets.ndim == 1:
            known_B = (targets >= 0).to(logits_BK.dtype)
            targets = targets.clamp(min=0)
        else:
            known_B = targets.sum(1)
            # of no shares the loss is multiplied by 0
            targets = targets / known_B.clamp(min=1e-6)[:, None]
        loss_B = F.cross_entropy(
            logits_BK,
            targets,
            weight=self.class_weights_K,
            reduction="none",
            label_smoothing=self.smoothing,
        )
        return (known_B * loss_B).sum() / known_B.sum().clamp(min=1.0)
