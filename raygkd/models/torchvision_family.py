"""torchvision's classifiers."""

from __future__ import annotations

from collections.abc import Sequence

import torchvision
from torch import nn

from raygkd.models.families import ModelFamily
from raygkd.registry import FAMILIES


@FAMILIES.register("torchvision")
class Torchvision(ModelFamily):
    """Any of torchvision's classification models; without their auxiliary heads."""

    def names(self) -> Sequence[str]:
        """Return torchvision's names."""
        return torchvision.models.list_models(module=torchvision.models)

    def build(self, name: str, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
        """Return an untrained classifier."""
        # the auxiliary heads would get no gradient; init_weights=None makes these two models warn
        options = {"aux_logits": False, "init_weights": True}
        return torchvision.models.get_model(
            name,
            weights=None,
            num_classes=num_classes,
            **(options if name in ("googlenet", "inception_v3") else {}),
        )
