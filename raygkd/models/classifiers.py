"""The classifiers by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial

from torch import nn

from raygkd.errors import ConfigError, brief, near
from raygkd.models.cifar_resnet import cifar_resnet
from raygkd.models.families import (
    FUNCTIONS,
    build_of_family,
    check_family_name,
    family_of,
    is_of_family,
)
from raygkd.models.vgg import vgg
from raygkd.models.wide_resnet import wide_resnet
from raygkd.registry import FAMILIES, Registry

CLASSIFIERS: Registry[Callable[[int], nn.Module]] = Registry(
    "classifier", "raygkd.classifiers", Callable
)

for _depth in (8, 14, 20, 32, 44, 56, 110):
    CLASSIFIERS.register(f"resnet{_depth}")(partial(cifar_resnet, _depth, (16, 16, 32, 64)))
for _depth in (8, 32):
    CLASSIFIERS.register(f"resnet{_depth}x4")(partial(cifar_resnet, _depth, (32, 64, 128, 256)))
for _depth, _widening in ((16, 2), (40, 1), (40, 2)):
    CLASSIFIERS.register(f"wrn_{_depth}_{_widening}")(partial(wide_resnet, _depth, _widening))
for _depth, _convolutions in (
    (8, (1, 1, 1, 1, 1)),
    (11, (1, 1, 2, 2, 2)),
    (13, (2, 2, 2, 2, 2)),
):
    CLASSIFIERS.register(f"vgg{_depth}")(partial(vgg, _convolutions))


def classifier_names() -> list[str]:
    """Return the names of the built-in classifiers; those of families (``torchvision:NAME``) are
    known beside them."""
    return CLASSIFIERS.names()


def is_classifier(name: str) -> bool:
    """Return whether :func:`build_classifier` knows the name."""
    return name in classifier_names() or is_of_family(name, "classification")


def build_classifier(
    name: str, num_classes: int, image_size: tuple[int, int] = (224, 224)
) -> nn.Module:
    """Return a new classifier of images (B, 3, H, W) into logits (B, ``num_classes``).

    Its weights are random and depend on torch's seed alone.

    Args:
        name: one of :func:`classifier_names`; ``torchvision:NAME``, ``timm:NAME`` or ``hf:NAME``
            with a classifier of these libraries, GoogLeNet and Inception without their auxiliary
            heads; or ``FILE.py:FUNCTION`` or ``package.module:function``.
        num_classes: at least 2, or 1 for a model whose last layer is not used.
        image_size: height and width of the input in pixels, for families that ask for it.

    Raises:
        ConfigError: an unknown name or too few classes.
    """
    if num_classes < 1:
        raise ConfigError(f"a classifier needs a class or more, got {num_classes}")
    family = family_of(name)
    if family is not None:
        return build_of_family(family, name, num_classes, image_size)
    check_classifier_name(name)
    return CLASSIFIERS.get(name)(num_classes)


# files that hold weights, and no name of a model
WEIGHTS_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")


def check_classifier_name(name: str, *, trains: bool = False) -> None:
    """Refuse an unknown name; no model is built.

    Raises:
        ConfigError: names the nearest ones.
    """
    family = family_of(name)
    if family is not None:
        check_family_name(family, name)
        return
    prefix, colon, rest = name.partition(":")
    families = {one: FAMILIES.get(one) for one in FAMILIES.names() if one != FUNCTIONS}
    prefixes = [
        one
        for one, family in families.items()
        if family.task == "classification" and not (trains and family.only_teaches)
    ]
    if colon:
        meant = difflib.get_close_matches(prefix, families, n=1)
        hint = f"; did you mean '{meant[0]}:{rest}'?" if meant else ""
        raise ConfigError(
            f"unknown classifier {brief(name)}{hint} (the prefix must be one of "
            f"{', '.join(families)}, a FILE.py, or an installed package)"
        )
    if name.endswith(".py"):
        raise ConfigError(
            f"{name} is a Python file; add the function that returns the model ({name}:FUNCTION)"
        )
    if name.endswith(WEIGHTS_SUFFIXES):
        raise ConfigError(
            f"{brief(name)} is a weights file; pass the name of its model here, and the file as "
            f"--{'student' if trains else 'teacher'}-weights"
        )
    known = classifier_names()
    if name in known:
        CLASSIFIERS.get(name)
        return
    meant = [f"'{prefix}:{name}'" for prefix in prefixes if is_classifier(f"{prefix}:{name}")]
    if meant:
        raise ConfigError(f"unknown classifier {brief(name)}; did you mean {' or '.join(meant)}?")
    if not near(name, known):
        others = ", ".join(f"{one}:NAME" for one in prefixes)
        raise ConfigError(
            f"unknown classifier {brief(name)} (known: {', '.join(known)}, {others}, "
            "FILE.py:FUNCTION)"
        )
    CLASSIFIERS.get(name)


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, trainable or not."""
    return sum(parameter.numel() for parameter in model.parameters())
