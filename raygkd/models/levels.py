"""Levels: the stages of a classifier, counted from 1, or the maps of a detector's pyramid.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from raygkd.errors import ConfigError
from raygkd.models.detectors import Detector
from raygkd.models.named import NamedLevels
from raygkd.models.staged import StagedClassifier

PROBE_SIZE = (224, 224)


def stage_modules(model: nn.Module) -> dict[int, str]:
    """Return level -> dotted path of the module whose output is the level's map (B, C, H, W).

    The levels of a detector are those of its pyramid; of a classifier, its stages from 1. The
    built-in classifiers name their stages. For other models a stage is a resolution they work at,
    found by a forward pass on one 224 x 224 image:

    1. The candidates are the children of the model, without the last one to run (the head). In the
       place of a Sequential or ModuleList stand its children, where they give maps of different
       sizes or where it is not called itself.
    2. A candidate gives a size when its output is (B, C, S, S). A size is a stage when the
       candidates that give it hold a convolution. The first one is not when it is smaller than the
       image and they hold a single convolution (a strided stem).
    3. The stage's module is the last candidate to run that gives its size. Its output is taken as
       it is; in pre-activation networks (DenseNet) it is not activated.

    Raises:
        ConfigError: the model has no such stage (vision transformers, channels-last models).
    """
    paths = all_levels(model)
    if not paths:
        raise ConfigError(
            f"{type(model).__name__} has no convolutional stages (maps of shape (B, C, H, W)) to "
            "take feature levels from; choose a convolutional classifier"
        )
    return paths


def all_levels(model: nn.Module) -> dict[int, str]:
    """Return what :func:`stage_modules` does; nothing for a model that has no stage."""
    if isinstance(model, Detector):
        return dict(model.pyramid)
    if isinstance(model, NamedLevels):
        return dict(model.levels)
    of_family: Any = getattr(model, "family_levels", None)
    if of_family is not None:
        return dict(of_family)
    paths = list(model.stages) if isinstance(model, StagedClassifier) else _find_stages(model)
    return dict(enumerate(paths, start=1))


def check_levels(levels: Sequence[int], model: nn.Module, role: str) -> dict[int, str]:
    """Return level -> module path, as :func:`stage_modules` does, of the given levels alone.

    Args:
        levels: those wanted; none at all is allowed for any model.
        model: a classifier or detector.
        role: what errors call it ("student resnet20").

    Raises:
        ConfigError: a level that the model does not have, or is given twice.
    """
    if not levels:
        return {}
    known = stage_modules(model)
    for level in levels:
        if level not in known:
            allowed = ", ".join(map(str, known))
            raise ConfigError(f"{role} has no level {level!r} (allowed: {allowed})")
        if list(levels).count(level) > 1:
            raise ConfigError(f"level {level} of {role} is given more than once")
    return {level: known[level] for level in levels}


def feature_shapes(
    model: nn.Module, levels: Sequence[int], image_size: tuple[int, int]
) -> dict[int, tuple[int, int, int]]:
    """Return level -> (C, H, W) for images of ``image_size`` (height, width in pixels).

    Nothing is computed and the model is left as it was.

    Raises:
        ConfigError: an unknown level, or images the model cannot take.
    """
    paths = check_levels(levels, model, type(model).__name__)
    shapes = _output_shapes(model, paths.values(), image_size)
    sizes = {}
    for level, path in paths.items():
        _, channels, height, width = shapes[path]
        sizes[level] = (channels, height, width)
    return sizes


def _find_stages(model: nn.Module) -> list[str]:
    containers = {
        name: [f"{name}.{child}" for child, _ in module.named_children()]
        for name, module in model.named_children()
        if isinstance(module, nn.Sequential | nn.ModuleList)
    }
    children = [name for name, _ in model.named_children()]
    shapes = _output_shapes(model, chain(children, *containers.values()), PROBE_SIZE)
    # a channels-last map (B, S, S, C) is not square in its last two dimensions
    sizes = {p: shape[3] for p, shape in shapes.items() if len(shape) == 4 and shape[2] == shape[3]}
    head = [path for path in shapes if path in children][-1:]
    candidates = set(children).difference(head)
    for name, inner in containers.items():
        resolutions = {sizes[path] for path in inner if path in sizes}
        if name in candidates and (name not in shapes or len(resolutions) > 1):
            candidates = candidates.difference([name]).union(inner)
    convolutions: dict[int, int] = {}
    last: dict[int, str] = {}
    for path, size in sizes.items():
        if path in candidates:
            parts = model.get_submodule(path).modules()
            convolutions[size] = convolutions.get(size, 0) + sum(
                isinstance(part, nn.Conv2d) for part in parts
            )
            last[size] = path
    stages = [size for size in last if convolutions[size]]
    if stages and stages[0] < PROBE_SIZE[0] and convolutions[stages[0]] == 1:
        stages = stages[1:]
    return [last[size] for size in stages]


def _output_shapes(
    model: nn.Module, paths: Iterable[str], image_size: tuple[int, int]
) -> dict[str, tuple[int, ...]]:
    """Return path -> shape of the module's output, in the order in which the modules finish.

    The forward pass runs in eval mode on the meta device: shapes without arithmetic, and batch
    statistics that stay as they are. A module that does not run or returns no tensor is left out.
    Of a detector the backbone with its pyramid runs: what is done with boxes needs their values.
    """
    part = model.get_submodule("net.backbone") if isinstance(model, Detector) else model
    shapes: dict[str, tuple[int, ...]] = {}

    def note(path: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            shapes[path] = tuple(output.shape)

    tensors = chain(part.named_parameters(), part.named_buffers())
    state = {name: tensor.detach().to("meta") for name, tensor in tensors}
    dtype = next((t.dtype for t in state.values() if t.is_floating_point()), None)
    image_BCHW = torch.empty(1, 3, *image_size, dtype=dtype, device="meta")
    training = [module for module in model.modules() if module.training]
    handles = [
        model.get_submodule(path).register_forward_hook(partial(note, path)) for path in paths
    ]
    model.eval()
    try:
        with torch.no_grad():
            functional_call(part, state, (image_BCHW,))
    except (RuntimeError, AssertionError, ValueError) as error:
        height, width = image_size
        raise ConfigError(
            f"{type(model).__name__} cannot take images of {height} x {width} pixels: "
            f"{str(error).splitlines()[0] if str(error) else 'they are too small'}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    return shapes
