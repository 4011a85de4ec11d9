"""A second view of the images of a batch, for losses that compare two.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch
from torch import Tensor

from raygkd.data.views import Views

_CHANGE = Views(policy="randaugment")


def with_second_view(batch: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return a batch followed by its images changed by RandAugment, the same for the same seed.

    Args:
        batch: "image" uint8 (B, C, H, W), and other tensors (B, ...), which are repeated.
        seed: of the changes.
    """
    draw = random.Random(seed)
    changed_BCHW = torch.stack([_CHANGE(image_CHW, draw) for image_CHW in batch["image"]])
    others = {name: torch.cat([values, values]) for name, values in batch.items()}
    return {**others, "image": torch.cat([batch["image"], changed_BCHW])}
