"""Any model with levels that its owner names.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from raygkd.errors import ConfigError, near


class NamedLevels(nn.Module):
    """A model whose levels are the outputs of some of its modules, counted from 1.

    It holds the model itself and no copy.

    Args:
        model: of any input and output.
        paths: dotted paths of the modules, whose outputs are feature maps (B, C, H, W).
        role: what errors call the model ("student").

    Attributes:
        levels: level -> path of its module inside this one.

    Raises:
        ConfigError: a path that is none of the model's, or is given twice.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str], role: str):
        super().__init__()
        known = [path for path, _ in model.named_modules() if path]
        for path in paths:
            if path not in known:
                children = ", ".join(name for name, _ in model.named_children())
                raise ConfigError(
                    f"levels: the {role} {type(model).__name__} has no module "
                    f"{path!r}{near(path, known)} (its own are {children})"
                )
            if list(paths).count(path) > 1:
                raise ConfigError(f"levels: module {path!r} of the {role} is given more than once")
        self.model = model
        self.levels = {number: f"model.{path}" for number, path in enumerate(paths, start=1)}

    def forward(self, *arguments: Any) -> Any:
        """Return what the model does."""
        return self.model(*arguments)


def map_shapes(
    maps: dict[int, Tensor], paths: Sequence[str], role: str
) -> dict[int, tuple[int, int, int]]:
    """Return level -> (C, H, W) of feature maps.

    Args:
        maps: level -> what its module gave.
        paths: of the modules, for errors.
        role: whose they are, for errors.

    Raises:
        ConfigError: a module gives something else than (B, C, H, W).
    """
    shapes = {}
    for level, path in enumerate(paths, start=1):
        found = maps.get(level)
        if not isinstance(found, Tensor) or found.ndim != 4:
            given = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ConfigError(
                f"levels: module {path!r} of the {role} gives {given} and no feature map "
                "(B, C, H, W): name one that does"
            )
        _, channels, height, width = found.shape
        shapes[level] = (channels, height, width)
    return shapes
