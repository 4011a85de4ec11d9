"""Feature maps of a model's levels, taken by removable hooks.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from raygkd.errors import ConfigError
from raygkd.models.levels import all_levels, check_levels
from raygkd.models.map_layouts import MapLayout
from raygkd.models.named import NamedLevels


class FeatureTap:
    """Calls a model and returns its output together with the feature maps of some levels.

    The tap is not a module, and refers to the model without owning it, so a module may hold both
    (and be wrapped in DDP) without a parameter being counted twice. Calls of the model that do not
    go through the tap keep nothing. It is made before the model is compiled; a compiled model of
    the same kind is used again as if it had the same hooks, so the hooks do not depend on
    ``levels``.

    A map that a later module changes in place, such as an in-place activation, is kept as it was.
    Which maps those are is learned in the first call of each mode, which copies them all, and uses
    the copies of those: a copy between map and loss would change the order in which gradients are
    added, and a resumed training must equal one without a break bit for bit.

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
        # mode of the model -> levels whose maps are changed after their module has returned them
        self._changed: dict[tuple[bool, bool], frozenset[int]] = {}
        self._mode = (False, False)
        # level -> the module's output, its version, and a copy
        self._outputs: dict[int, tuple[Tensor, int, Tensor]] = {}
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
            ConfigError: a level's module did not run.
        """
        if self._is_removed:
            raise RuntimeError("this tap has been removed from its model")
        features: dict[int, Tensor] = {}
        self._features = features
        self._mode = (self.model.training, torch.is_grad_enabled())
        try:
            output = self.model(*arguments)
            if self._mode not in self._changed:
                copies = {
                    level: copy_BCHW
                    for level, (tensor, version, copy_BCHW) in self._outputs.items()
                    if tensor._version != version
                }
                self._changed[self._mode] = frozenset(copies)
                features |= copies
        finally:
            self._features = None
            self._outputs = {}
        for level in self.levels:
            if level not in features:
                self._raise_missing(level)
        return output, {level: features[level] for level in self.levels}

    def _raise_missing(self, level: int) -> None:
        model, path = self.model, all_levels(self.model)[level].path
        if isinstance(model, NamedLevels):
            path = model.path(level)
            model = model.model
        raise ConfigError(
            f"module {path!r} of {type(model).__name__} returned nothing in this call: it did not "
            "run, was replaced, or the model was compiled and used before its levels were chosen; "
            "compile it afterwards, or call torch.compiler.reset() first"
        )

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
        if self._features is None:
            return
        maps_BCHW = layout.read(output)
        if not isinstance(maps_BCHW, Tensor):
            self._features[level] = maps_BCHW
            return
        # a compiler sees no versions, and removes a copy that is not needed
        if torch.compiler.is_compiling():
            self._features[level] = maps_BCHW.clone()
            return
        changed = self._changed.get(self._mode)
        if changed is None and not maps_BCHW.is_inference():
            self._outputs[level] = maps_BCHW, maps_BCHW._version, maps_BCHW.clone()
        is_copied = maps_BCHW.is_inference() or (changed is not None and level in changed)
        self._features[level] = maps_BCHW.clone() if is_copied else maps_BCHW
