"""Random changes of a training image besides its crop: RandAugment, TrivialAugment and erasing.

Shapes: C channels (3), S side of the square model input.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

from torch import Tensor
from torchvision.transforms import v2

from raygkd.data.seeds import seeded

# torchvision's defaults
_POLICIES = {"randaugment": v2.RandAugment, "trivial-augment": v2.TrivialAugmentWide}
# a seed must be a whole number, and a random number has 53 bits
_SEEDS = 1 << 53


@dataclass(frozen=True, kw_only=True)
class Views:
    """How training images are changed after their crop.

    Attributes:
        policy: "none", "randaugment" or "trivial-augment".
        erase: probability that a random box is blackened.
    """

    policy: str = "none"
    erase: float = 0.0

    @property
    def are_random(self) -> bool:
        """Whether an image is changed at all."""
        return self.policy != "none" or self.erase > 0

    def __call__(self, image_CSS: Tensor, draw: random.Random) -> Tensor:
        """Return a changed uint8 image (3, S, S), which depends on the image and on ``draw``."""
        if not self.are_random:
            return image_CSS
        with seeded(int(draw.random() * _SEEDS)):
            return _change(self)(image_CSS)


UNCHANGED = Views()


@functools.cache
def _change(views: Views) -> v2.Transform:
    policy = _POLICIES.get(views.policy)
    changes = [policy()] if policy is not None else []
    return v2.Compose([*changes, v2.RandomErasing(views.erase)])
