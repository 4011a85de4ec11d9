"""The last layer of a classifier, and the features that it reads.

Shapes: B batch, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from raygkd.errors import ConfigError


def last_linear(model: nn.Module, num_classes: int) -> tuple[str, nn.Linear]:
    """Return path and module of the linear layer that gives a classifier's logits.

    Raises:
        ConfigError: it has none, as a classifier whose last layer is a convolution.
    """
    layers = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == num_classes
    ]
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} has no linear last layer for {num_classes} classes: "
            "choose --teacher-mode finetune"
        )
    return layers[-1]


@contextmanager
def inputs_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what a layer reads, one entry (B, D) per call, while the context is open."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any) -> None:
        seen.append(inputs[0])

    handle = layer.register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()
