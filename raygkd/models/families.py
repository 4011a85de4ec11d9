"""Models that are named FAMILY:NAME, such as ``torchvision:resnet18``, or FILE.py:FUNCTION."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from raygkd.errors import ConfigError, near
from raygkd.models.inputs import ModelInput
from raygkd.models.loaded_weights import LoadedWeights
from raygkd.registry import FAMILIES

# names with more entries than this are not listed in errors
MOST_LISTED = 100
# FILE.py:FUNCTION or package.module:function
FUNCTION = re.compile(r"(.+\.py|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")
# what stands for the family of these names
FUNCTIONS = "function"
# in front of the name of a copied file
_DIGEST = re.compile(r"[0-9a-f]{16}-")


class ModelFamily(ABC):
    """Models of one origin; ``@FAMILIES.register(prefix)`` enters a subclass.

    Attributes:
        task: "classification" or "detection".
        loads_weights: whether ``load_weights`` reads what ``--student-weights`` says in a way of
            its own; weights files of classifiers are read without it.
        only_teaches: whether its models cannot be trained.
    """

    task: ClassVar[str] = "classification"
    loads_weights: ClassVar[bool] = False
    only_teaches: ClassVar[bool] = False

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

    def check_name(self, name: str) -> None:
        """Refuse a name that is none of the family's.

        Raises:
            ConfigError: names the nearest ones.
        """
        known = self.names()
        if name not in known:
            listed = f" (known: {', '.join(known)})" if len(known) < MOST_LISTED else ""
            raise ConfigError(f"{name!r}{near(name, known) or listed}")

    def inputs(self, name: str) -> ModelInput:
        """Return what a model of a name expects of its images; nothing of its own by default."""
        return ModelInput()

    def levels(self, model: nn.Module) -> dict[int, str] | None:
        """Return level -> path of its module; None to look for them by a forward pass."""
        return None

    def pretrained(self, name: str) -> str | None:
        """Return what the library calls the weights that it has for a name; None for none."""
        return None

    def class_names(self, name: str) -> tuple[str, ...]:
        """Return the names of the classes of the weights that ``pretrained`` names, in the order of
        their logits; () where the library says none.

        A class of several names has commas between them.
        """
        return ()

    def load_pretrained(self, model: nn.Module, name: str, num_classes: int) -> LoadedWeights:
        """Load the weights that ``pretrained`` names into a model that ``build`` returned.

        Layers of another number of classes keep their weights.

        Raises:
            UserError: the weights cannot be had.
        """
        raise NotImplementedError

    def by_texts(self, name: str) -> str | None:
        """Return the name, with its prefix, of the same model as a classifier by texts; None where
        it has no text encoder, or is one already.

        Raises:
            UserError: its configuration cannot be had.
        """
        return None

    def load_file(
        self, model: nn.Module, name: str, num_classes: int, path: str
    ) -> LoadedWeights | None:
        """Load a weights file in the family's own way; None where it has none.

        Raises:
            UserError: the file cannot be read or does not fit.
        """
        return None

    def load_weights(self, model: nn.Module, name: str, weights: str) -> None:
        """Load trained weights into a model, if the family ``loads_weights``.

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
    prefix = _parts(name)[0]
    return FAMILIES.get(prefix)() if prefix else None


def family_name(name: str) -> str:
    """Return a model's name as its family knows it."""
    return _parts(name)[1]


def is_of_family(name: str, task: str) -> bool:
    """Return whether a model of this name is one of a family for a task."""
    family = family_of(name)
    if family is None or family.task != task:
        return False
    with contextlib.suppress(ConfigError):
        family.check_name(family_name(name))
        return True
    return False


def check_family_name(family: ModelFamily, name: str) -> None:
    """Refuse an unknown name of a family, with its prefix.

    Raises:
        ConfigError: names the nearest ones.
    """
    prefix, rest = _parts(name)
    try:
        family.check_name(rest)
    except ConfigError as error:
        if prefix == FUNCTIONS:
            raise
        kind = "classifier" if family.task == "classification" else "detector"
        raise ConfigError(f"unknown {prefix} {kind} {error}") from error


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
    check_family_name(family, name)
    model = family.build(family_name(name), num_classes, image_size)
    levels = family.levels(model)
    if not hasattr(model, "input_size"):
        # levels are found at this size, where 224 x 224 is refused
        model.input_size = image_size  # type: ignore[assignment]
    if levels is not None:
        model.family_levels = levels  # type: ignore[assignment]
    return model


def model_input(name: str) -> ModelInput:
    """Return what a model expects of its images; nothing of its own where it has no family."""
    family = family_of(name)
    return ModelInput() if family is None else family.inputs(family_name(name))


def is_function(name: str) -> bool:
    """Return whether a model is named FILE.py:FUNCTION or package.module:function."""
    return _parts(name)[0] == FUNCTIONS


def source_file(name: str) -> str | None:
    """Return FILE.py of a model that is named FILE.py:FUNCTION; None for any other."""
    path, colon, _ = name.rpartition(":")
    return path if colon and path.endswith(".py") else None


def short_name(name: str) -> str:
    """Return a model's name as people are shown it: without folders, and marks of copied files."""
    path = source_file(name)
    if path is not None:
        return f"{_DIGEST.sub('', path.rpartition('/')[2])}:{name.rpartition(':')[2]}"
    prefix, colon, rest = name.partition(":/")
    return f"{prefix}:{rest.rstrip('/').rpartition('/')[2]}" if colon else name


def _parts(name: str) -> tuple[str, str]:
    """Return the family's prefix, "" where there is none, and the name behind it."""
    prefix, colon, rest = name.partition(":")
    if colon and prefix in FAMILIES.names() and prefix != FUNCTIONS:
        return prefix, rest
    match = FUNCTION.fullmatch(name)
    if match is not None and (match[1].endswith(".py") or _is_importable(match[1])):
        return FUNCTIONS, name
    return "", rest


def _is_importable(module: str) -> bool:
    """Return whether there is a package of this name; nothing is imported."""
    try:
        return importlib.util.find_spec(module.partition(".")[0]) is not None
    except ValueError:  # it has been shut out of this process
        return False
