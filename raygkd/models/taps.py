"""Feature maps of a model's levels, taken by removable hooks.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from raygkd.models.levels import all_levels, check_levels
from raygkd.models.map_layouts import MapLayout


class FeatureTap:
    """Calls a model and returns its output together with the feature maps of some levels.

    The tap is no module and refers to the model without owning it, so a module may hold both (and
    be wrapped in DDP) without a parameter being counted twice. Calls of the model that do not go
    through the tap keep nothing. It is made before the model is compiled; a compiled model of the
    same kind is used again as if it had the same hooks, so the hooks do not depend on ``levels``.

    Args:
        model: the classifier or detector.
        levels: those wanted; none at all is allowed for any model.

    Raises:
        ConfigError: a level the model does not have.
    """

    def __init__(self, model: nn.Module, levels: Sequence[int]):
        self.model = model
        self.levels = tuple(check_levels(levels, model, type(model).__name__))
        self._features: dict[int, Tensor] | None = None
        # partial, not a closure: a deep copy of the model then writes to a copy of the tap
        self._handles = [
            model.get_submodule(level.path).register_forward_hook(
                partial(self._keep, number, level.layout)
            )
            for number, level in all_levels(model).items()
        ]
        self._is_removed = False

    def __call__(self, *arguments: Any) -> tuple[Any, dict[int, Tensor]]:
        """Return the model's output and level -> feature map (B, C, H, W), with their gradients.

        Args:
            arguments: the model's: images (B, 3, H, W), and a detector's targets.

        Raises:
            RuntimeError: the tap has been removed.
        """
        if self._is_removed:
            raise RuntimeError("this tap has been removed from its model")
        features: dict[int, Tensor] = {}
        self._features = features
        try:
            output = self.model(*arguments)
        finally:
            self._features = None
        return output, {level: features[level] for level in self.levels}

    def remove(self) -> None:
        """Take the hooks off the model; it is as if the tap had never been."""
        for handle in self._handles:
            handle.remove()
        self._is_removed = True

    def __enter__(self) -> FeatureTap:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def _keep(
        self, level: int, layout: MapLayout, module: nn.Module, inputs: Any, output: Any
    ) -> None:
        if self._features is not None:
            self._features[level] = layout.read(output)
