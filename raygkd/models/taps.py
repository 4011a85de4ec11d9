"""Feature maps of a classifier's stages, taken by removable hooks.

Shapes: B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from raygkd.models.levels import check_levels


class FeatureTap:
    """Calls a classifier and returns its logits together with the feature maps of some levels.

    The tap is no module and refers to the classifier without owning it, so a module may hold both
    (and be wrapped in DDP) without a parameter being counted twice. Calls of the classifier that
    do not go through the tap keep nothing. It is made before the classifier is compiled.

    Args:
        model: the classifier.
        levels: the stages wanted; none at all is allowed for any model.

    Raises:
        ConfigError: a level the model does not have.
    """

    def __init__(self, model: nn.Module, levels: Sequence[int]):
        self.model = model
        self.levels = tuple(levels)
        self._features: dict[int, Tensor] | None = None
        # partial, not a closure: a deep copy of the model then writes to a copy of the tap
        self._handles = [
            model.get_submodule(path).register_forward_hook(partial(self._keep, level))
            for level, path in check_levels(levels, model, type(model).__name__).items()
        ]

    def __call__(self, images_BCHW: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """Return logits (B, K) and level -> feature map (B, C, H, W), with their gradients.

        Raises:
            RuntimeError: the tap has been removed.
        """
        if len(self._handles) != len(self.levels):
            raise RuntimeError("this tap has been removed from its model")
        features: dict[int, Tensor] = {}
        self._features = features
        try:
            logits_BK = self.model(images_BCHW)
        finally:
            self._features = None
        return logits_BK, {level: features[level] for level in self.levels}

    def remove(self) -> None:
        """Take the hooks off the model; it is as if the tap had never been."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> FeatureTap:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def _keep(self, level: int, module: nn.Module, inputs: Any, output_BCHW: Tensor) -> None:
        if self._features is not None:
            self._features[level] = output_BCHW
