"""Levels: stages or blocks of a classifier, counted from 1, or the maps of a detector's pyramid.

Shapes: B batch, C channels, H height, W width, N tokens, S side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from raygkd.errors import ConfigError, ImageSizeError, UserError, reason_of
from raygkd.models.detectors import Detector
from raygkd.models.map_layouts import MapLayout, find_layout, main_tensor
from raygkd.models.named import NamedLevels
from raygkd.models.staged import StagedClassifier

PROBE_SIZE = (224, 224)
# what models raise of images of a wrong size
OF_SIZES = (RuntimeError, AssertionError, ValueError)
# model -> what it prints of itself, and the size of images -> the shapes of its modules' outputs,
# or the error to raise
_Shapes = dict[str, tuple[int, ...]]
_probes: MutableMapping[nn.Module, dict[tuple[str, tuple[int, ...]], _Shapes | ConfigError]]
_probes = WeakKeyDictionary()


@dataclass(frozen=True)
class Level:
    """Where a model has a feature map.

    Attributes:
        path: dotted path of the module whose output holds it.
        layout: how the output holds it.
    """

    path: str
    layout: MapLayout = field(default_factory=MapLayout)


def stage_modules(model: nn.Module, image_size: tuple[int, int] | None = None) -> dict[int, str]:
    """Return level -> dotted path of the module whose output holds the level's map.

    The levels of a detector are those of its pyramid; of a classifier, its stages from 1. The
    built-in classifiers name their stages. For other models a stage is a resolution they work at,
    found by a forward pass on one 224 x 224 image, or where the model refuses that, on one of
    ``image_size`` or ``model.input_size`` (height and width in pixels):

    1. The candidates are the children of the model, without the last one to run (the head). In the
       place of a Sequential or ModuleList stand its children, where they give maps of different
       sizes or where it is not called itself. If none is a stage, the same is tried with the
       children of the largest child, and so on.
    2. A candidate gives a size when its output is (B, C, S, S). A size is a stage when the
       candidates that give it hold a convolution. The first one is not when it is smaller than the
       image and they hold a single convolution (a strided stem).
    3. The stage's module is the last candidate to run that gives its size. Its output is taken as
       it is; in pre-activation networks (DenseNet) it is not activated.
    4. A model without such stages, such as a vision transformer, has those of its blocks
       (``block_levels``).

    Raises:
        ConfigError: the model has neither.
    """
    paths = {number: level.path for number, level in all_levels(model, image_size).items()}
    if not paths:
        raise ConfigError(
            f"{type(model).__name__} has no stages and no blocks that return feature maps; choose "
            "another classifier, or a method that uses only logits, such as kd"
        )
    return paths


def all_levels(model: nn.Module, image_size: tuple[int, int] | None = None) -> dict[int, Level]:
    """Return the levels of :func:`stage_modules`; nothing for a model that has none."""
    if isinstance(model, NamedLevels):
        return {
            number: Level(path, model.layouts.get(number, MapLayout()))
            for number, path in model.levels.items()
        }
    of_family: Any = getattr(model, "family_levels", None)
    if isinstance(model, Detector):
        paths = dict(model.pyramid)
    elif of_family is not None:
        paths = dict(of_family)
    elif isinstance(model, StagedClassifier):
        paths = dict(enumerate(model.stages, start=1))
    else:
        return dict(enumerate(_probed_levels(model, image_size), start=1))
    return {number: Level(path) for number, path in paths.items()}


def check_levels(
    levels: Sequence[int],
    model: nn.Module,
    role: str,
    image_size: tuple[int, int] | None = None,
) -> dict[int, str]:
    """Return level -> module path, as :func:`stage_modules` does, of the given levels alone.

    Args:
        levels: those wanted; none at all is allowed for any model.
        model: a classifier or detector.
        role: what errors call it ("student resnet20").
        image_size: height and width in pixels of images that it can take, where it may refuse 224.

    Raises:
        ConfigError: a level that the model does not have, or is given twice.
    """
    if not levels:
        return {}
    known = stage_modules(model, image_size)
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
    check_levels(levels, model, type(model).__name__, image_size)
    known = all_levels(model, image_size) if levels else {}
    shapes = _output_shapes(model, [known[level].path for level in levels], image_size)
    return {level: known[level].layout.shape(shapes[known[level].path]) for level in levels}


def _probed_levels(model: nn.Module, image_size: tuple[int, int] | None) -> list[Level]:
    """Return the levels that forward passes show."""
    own_size: tuple[int, int] | None = image_size or getattr(model, "input_size", None)
    try:
        return _levels_at(model, PROBE_SIZE)
    except ConfigError:
        if own_size is None:
            raise
        return _levels_at(model, own_size)


def _levels_at(model: nn.Module, image_size: tuple[int, int]) -> list[Level]:
    root: str | None = ""
    while root is not None:
        if stages := _find_stages(model, image_size, root):
            return [Level(path) for path in stages]
        # a wrapper around a network; in a network without stages there are none further inside
        root = _largest_child(model, root)
    return block_levels(model, image_size)


def _largest_child(model: nn.Module, root: str) -> str | None:
    """Return the path of the child of a module that has the most parameters; None without any."""
    sizes = {
        f"{root}.{name}" if root else name: sum(part.numel() for part in child.parameters())
        for name, child in model.get_submodule(root).named_children()
    }
    largest = max(sizes, key=lambda path: sizes[path], default=None)
    return largest if largest is not None and sizes[largest] else None


def block_levels(model: nn.Module, image_size: tuple[int, int]) -> list[Level]:
    """Return the levels of a model of blocks, such as a vision transformer.

    Blocks are the children of a Sequential or ModuleList that give maps with channels last
    (B, H, W, C), or tokens (B, N, C) of a grid, perhaps behind some of no place. Where their grids
    differ (Swin), a level is the last block of each grid; where all have one, there are four: the
    blocks at a quarter, half, three quarters and the end of the depth.

    Args:
        model: of normalised images.
        image_size: height and width in pixels of an image that it can take.
    """
    containers = [
        (path, [f"{path}.{child}" if path else child for child, _ in module.named_children()])
        for path, module in model.named_modules()
        if isinstance(module, nn.Sequential | nn.ModuleList)
    ]
    shapes = _output_shapes(
        model, chain.from_iterable(inner for _, inner in containers), image_size
    )
    blocks: list[Level] = []
    for path, inner in containers:
        # modules inside a block are not blocks
        if any(path == block.path or path.startswith(f"{block.path}.") for block in blocks):
            continue
        for child in inner:
            layout = find_layout(shapes[child], image_size) if child in shapes else None
            if layout is not None and layout.order != "BCHW":
                blocks.append(Level(child, layout))
    grids = {level.path: level.layout.shape(shapes[level.path])[1:] for level in blocks}
    if len(set(grids.values())) > 1:
        return list({grids[level.path]: level for level in blocks}.values())
    depths = sorted({math.ceil(len(blocks) * quarter / 4) for quarter in range(1, 5)})
    return [blocks[depth - 1] for depth in depths if depth]


def _find_stages(model: nn.Module, image_size: tuple[int, int], root: str) -> list[str]:
    """Return the paths of the stages among the children of the module ``root`` of a model."""
    named = {
        f"{root}.{name}" if root else name: module
        for name, module in model.get_submodule(root).named_children()
    }
    containers = {
        name: [f"{name}.{child}" for child, _ in module.named_children()]
        for name, module in named.items()
        if isinstance(module, nn.Sequential | nn.ModuleList)
    }
    children = list(named)
    shapes = _output_shapes(model, chain(children, *containers.values()), image_size)
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
    if stages and stages[0] < image_size[1] and convolutions[stages[0]] == 1:
        stages = stages[1:]
    return [last[size] for size in stages]


def _output_shapes(
    model: nn.Module, paths: Iterable[str], image_size: tuple[int, int]
) -> dict[str, tuple[int, ...]]:
    """Return path -> shape of the module's output, in the order in which the modules finish.

    All of a model's shapes are found at once, and remembered as long as the model is the same.

    Raises:
        ImageSizeError: the model cannot take such images.
        ConfigError: it fails in another way.
    """
    found = _remembered_shapes(model, image_size)
    if isinstance(found, ConfigError):
        raise type(found)(str(found))
    wanted = set(paths)
    return {path: shape for path, shape in found.items() if path in wanted}


def _remembered_shapes(model: nn.Module, image_size: tuple[int, int]) -> _Shapes | ConfigError:
    """Return the shapes of all modules' outputs, or the error to raise."""
    known = _probes.setdefault(model, {})
    # what a model prints of itself changes with its modules
    key = (repr(model), tuple(image_size))
    if key not in known:
        try:
            known[key] = _probed_shapes(model, image_size, "meta")
        except UserError:
            raise
        except Exception:  # of any type: a forward pass may be anyone's code
            # code that looks at values does not run without any
            known[key] = _shapes_or_error(model, image_size)
    return known[key]


def _shapes_or_error(model: nn.Module, image_size: tuple[int, int]) -> _Shapes | ConfigError:
    try:
        device = next((str(p.device) for p in model.parameters()), "cpu")
        return _probed_shapes(model, image_size, device)
    except UserError:
        raise
    except Exception as error:  # as above
        is_size = isinstance(error, OF_SIZES)
        problem = "cannot take" if is_size else "fails on"
        height, width = image_size
        # it was not raised, so that it holds no model
        return (ImageSizeError if is_size else ConfigError)(
            f"{type(model).__name__} {problem} images of {height} x {width} pixels: "
            f"{reason_of(error)}"
        )


def _probed_shapes(
    model: nn.Module, image_size: tuple[int, int], device: str
) -> dict[str, tuple[int, ...]]:
    """Return what ``_output_shapes`` does, of all modules.

    The forward pass runs in eval mode, on the meta device if possible: shapes without arithmetic,
    and batch statistics that stay as they are. A module that does not run or returns no tensor is
    left out. Of a detector the backbone with its pyramid runs: what is done with boxes needs their
    values.
    """
    part = model.get_submodule("net.backbone") if isinstance(model, Detector) else model
    shapes: dict[str, tuple[int, ...]] = {}

    def note(path: str, module: nn.Module, inputs: Any, output: Any) -> None:
        output = main_tensor(output)
        if isinstance(output, Tensor):
            shapes[path] = tuple(output.shape)

    tensors = chain(part.named_parameters(), part.named_buffers())
    state = {name: tensor.detach().to(device) for name, tensor in tensors}
    dtype = next((t.dtype for t in state.values() if t.is_floating_point()), None)
    image_BCHW = torch.zeros(1, 3, *image_size, dtype=dtype, device=device)
    training = [module for module in model.modules() if module.training]
    handles = [
        module.register_forward_hook(partial(note, path))
        for path, module in model.named_modules(remove_duplicate=False)
    ]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            functional_call(part, state, (image_BCHW,))
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    return shapes
