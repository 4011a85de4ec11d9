"""The last layer of a classifier, and the features that it reads.

Shapes: B batch, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
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
            f"{type(model).__name__} has no linear last layer for {num_classes} classes; choose "
            "--teacher-mode finetune"
        )
    return layers[-1]


def check_gives_logits(layer: nn.Linear, model: nn.Module, image_size: tuple[int, int]) -> None:
    """Check that a classifier's logits are the output of a layer, and nothing else.

    Args:
        layer: of the model.
        model: the classifier.
        image_size: height and width of its input in pixels.

    Raises:
        ConfigError: they are not, as in a model with two heads, or one that averages over tokens.
    """
    outputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda *call: outputs.append(call[2]))
    was_training = model.training
    try:
        with torch.inference_mode():
            logits_BK = model.eval()(
                torch.linspace(-1, 1, 3).view(1, 3, 1, 1).expand(2, 3, *image_size)
            )
    finally:
        handle.remove()
        model.train(was_training)
    if len(outputs) != 1 or not torch.equal(outputs[0], logits_BK):
        raise ConfigError(
            f"the logits of {type(model).__name__} are not the output of its last linear layer; "
            "choose --teacher-mode finetune"
        )


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


class ProxyTap:
    """Takes the embeddings of a classifier's images, and the vectors that stand for its classes.

    They are what its last linear layer reads, and the rows of its weights. A model with attributes
    ``embedding``, a module that gives the embeddings, and ``class_proxies`` (K, D) has those. Like
    a ``FeatureTap``, it is not a module, and refers to the model without owning it.

    Args:
        model: the classifier.
        num_classes: K.

    Raises:
        ConfigError: its last layer is not linear.
    """

    def __init__(self, model: nn.Module, num_classes: int):
        self._embedding_BD: Tensor | None = None
        if hasattr(model, "class_proxies"):
            self._owner, self._name = model, "class_proxies"
            embedding = model.get_submodule("embedding")
            self._handle = embedding.register_forward_hook(self._keep_output)
        else:
            try:
                _, layer = last_linear(model, num_classes)
            except ConfigError as error:
                raise ConfigError(
                    f"{type(model).__name__} has no linear last layer for {num_classes} classes, "
                    "whose weights would be the class proxies; choose another method than prg"
                ) from error
            self._owner, self._name = layer, "weight"
            self._handle = layer.register_forward_pre_hook(self._keep_input)

    @property
    def class_proxies_KD(self) -> Tensor:
        """The vectors of the classes (K, D)."""
        return getattr(self._owner, self._name)

    @property
    def size(self) -> int:
        """D, the entries of an embedding."""
        return self.class_proxies_KD.shape[1]

    def take(self) -> Tensor:
        """Return the embeddings (B, D) of the model's last call; they are not kept."""
        embedding_BD, self._embedding_BD = self._embedding_BD, None
        if embedding_BD is None:
            raise RuntimeError("the model has not been called since its embeddings were taken")
        return embedding_BD

    def remove(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()

    def _keep_input(self, module: nn.Module, inputs: Any) -> None:
        self._embedding_BD = inputs[0]

    def _keep_output(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._embedding_BD = output
