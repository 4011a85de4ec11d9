"""A classifier of some of another's classes: the same weights, with the logits that are wanted.

Shapes: B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from raygkd.errors import ConfigError
from raygkd.models.by_name import build_model
from raygkd.models.families import short_name
from raygkd.models.files import ModelFile, build_from_file

# relative and absolute difference of logits that are equal
TOLERANCE = (1e-4, 1e-4)


def with_classes(
    model_file: ModelFile, places: Sequence[int], class_names: tuple[str, ...]
) -> ModelFile:
    """Return the file of a classifier whose logits are some of another's, in another order.

    Args:
        model_file: of the other classifier.
        places: of the wanted classes among its own.
        class_names: of the wanted classes.

    Raises:
        ConfigError: its logits are not those of a last layer with one row of weights per class.
    """
    name, size = model_file.name, model_file.image_size
    count = len(model_file.class_names)
    rows = torch.tensor(places)
    state = dict(model_file.state_dict)
    by_class = _tensors_by_class(name, count, size)
    for key in by_class:
        state[key] = state[key][rows]
    selected = dataclasses.replace(model_file, class_names=class_names, state_dict=state)
    whole, part = build_from_file(model_file), build_from_file(selected)
    if not by_class or not _gives_rows(part, whole, rows, size):
        raise ConfigError(
            f"the classes of {short_name(name)} cannot be selected: its logits are not those of a "
            "last layer with one row of weights per class; choose --teacher-mode finetune"
        )
    return selected


def _tensors_by_class(name: str, count: int, image_size: tuple[int, int]) -> list[str]:
    """Return the names of a model's weights that have a row for each class."""
    with torch.random.fork_rng(devices=[]):
        own, other = (build_model(name, n, image_size).state_dict() for n in (count, count + 1))
    return [
        key
        for key, tensor in own.items()
        if tensor.ndim and key in other and len(tensor) == count and len(other[key]) == count + 1
    ]


@torch.inference_mode()
def _gives_rows(
    part: nn.Module, whole: nn.Module, rows: torch.Tensor, image_size: tuple[int, int]
) -> bool:
    """Return whether a model's logits are some of another's."""
    generator = torch.Generator().manual_seed(0)
    images_BCHW = torch.randn(2, 3, *image_size, generator=generator)
    wanted_BK = whole(images_BCHW)[:, rows]
    relative, absolute = TOLERANCE
    return torch.allclose(part(images_BCHW), wanted_BK, rtol=relative, atol=absolute)
