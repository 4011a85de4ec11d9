"""Mixed images: MixUp and CutMix of the images of a batch.

Shapes: B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchvision.transforms import v2

from raygkd.data.seeds import seeded


class Mixing:
    """Mixes each image of a batch, and its label, with another one.

    Args:
        mixup: alpha of MixUp; 0 for none.
        cutmix: alpha of CutMix; 0 for none. With both, each batch draws one of them.
        num_classes: K.
    """

    def __init__(self, *, mixup: float, cutmix: float, num_classes: int):
        kinds = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        # images without a label are a class of their own, which is taken off afterwards
        self._num_classes = num_classes
        self._kinds = [
            kind(alpha=alpha, num_classes=num_classes + 1) for kind, alpha in kinds if alpha
        ]

    def __call__(
        self, batch: Mapping[str, Tensor], seed: int, device: torch.device
    ) -> dict[str, Tensor]:
        """Return a batch whose images are mixed, and the same for the same seed.

        Args:
            batch: "image" uint8 (B, C, H, W) and "label" (B,), -1 where there is none.
            seed: of the draws.
            device: where to mix.

        Returns:
            the batch with "image" float in 0..255 and "shares" (B, K) of the classes, on the
            device; "label" is the class with the largest share, -1 if that has no label.
        """
        images_BCHW = batch["image"].to(device, non_blocking=True).float()
        labels_B = batch["label"].to(device, non_blocking=True)
        with seeded(seed):
            mix = self._kinds[int(torch.randint(len(self._kinds), ()))]
            labels_B = labels_B.where(labels_B >= 0, self._num_classes)
            images_BCHW, shares_BK = mix(images_BCHW, labels_B)
        labels_B = shares_BK.argmax(1)
        mixed = {
            "image": images_BCHW,
            "label": labels_B.where(labels_B < self._num_classes, -1),
            "shares": shares_BK[:, : self._num_classes],
        }
        return {**batch, **mixed}
