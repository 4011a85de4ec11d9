"""Models that are named FAMILY:NAME, such as ``torchvision:resnet18``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from raygkd.errors import ConfigError, near
from raygkd.models.inputs import ModelInput
from raygkd.registry import FAMILIES


class ModelFamily(ABC):
    """Models of one origin; ``@FAMILIES.register(prefix)`` enters a subclass.

    Attributes:
        task: "classification" or "detection".
        loads_weights: whether ``load_weights`` can be used, by ``--student-weights``.
    """

    task: ClassVar[str] = "classification"
    loads_weights: ClassVar[bool] = False

    @abstractmethod
    def names(self) -> Sequence[str]:
        """Return the names of the models, without the prefix."""

    @abstractmethod
    def build(self, name: str, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
        """Return a new model with weights that depend on torch's seed alone.

        Args:
            name: one of ``names``.
            num_classes: without a background.
            image_size: height and width of the input in pixels.

        Returns:
            A module of normalised images (B, 3, H, W) to logits (B, K), or a ``Detector``.
        """

    def inputs(self, name: str) -> ModelInput:
        """Return what a model of a name expects of its images; nothing of its own by default."""
        return ModelInput()

    def levels(self, model: nn.Module) -> dict[int, str] | None:
        """Return level -> path of its module; None to look for them by a forward pass."""
        return None

    def load_weights(self, model: nn.Module, name: str, weights: str) -> None:
        """Load trained weights into a model.

        Args:
            model: that ``build`` returned.
            name: one of ``names``.
            weights: what ``--student-weights`` or ``--teacher-weights`` says: a path that exists
                comes absolute, anything else as it was given.

        Raises:
            UserError: they cannot be had or do not fit.
        """
        raise NotImplementedError


def family_of(name: str) -> ModelFamily | None:
    """Return the family of a model's name; None where no family's prefix stands before a colon."""
    prefix, colon, _ = name.partition(":")
    return FAMILIES.get(prefix)() if colon and prefix in FAMILIES.names() else None


def is_of_family(name: str, task: str) -> bool:
    """Return whether a model of this name is one of a family for a task."""
    family = family_of(name)
    return family is not None and family.task == task and _rest(name) in family.names()


def build_of_family(
    family: ModelFamily, name: str, num_classes: int, image_size: tuple[int, int]
) -> nn.Module:
    """Return a new model of a family.

    Args:
        family: of the model.
        name: with the prefix.
        num_classes: without a background.
        image_size: height and width of the input in pixels.

    Raises:
        ConfigError: an unknown name.
    """
    rest, known = _rest(name), family.names()
    if rest not in known:
        kind = "classifier" if family.task == "classification" else "detector"
        hint = near(rest, known) or f" (known: {', '.join(known)})"
        raise ConfigError(f"unknown {name.partition(':')[0]} {kind} {rest!r}{hint}")
    model = family.build(rest, num_classes, image_size)
    levels = family.levels(model)
    if levels is not None:
        model.family_levels = levels  # type: ignore[assignment]
    return model


def model_input(name: str) -> ModelInput:
    """Return what a model expects of its images; nothing of its own where it has no family."""
    family = family_of(name)
    return ModelInput() if family is None else family.inputs(_rest(name))


def load_of_family(family: ModelFamily, model: nn.Module, name: str, weights: str) -> None:
    """Load trained weights into a model; see ``ModelFamily.load_weights``."""
    family.load_weights(model, _rest(name), weights)


def _rest(name: str) -> str:
    return name.partition(":")[2]
