"""Any model with levels that its owner names.

Shapes: B batch, C channels, H height, W width, N tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from raygkd.errors import ConfigError, near
from raygkd.models.map_layouts import MapLayout, find_layout

# what torch.compile puts before the paths of a model's modules
_COMPILED = "_orig_mod."


class NamedLevels(nn.Module):
    """A model whose levels are the outputs of some of its modules, counted from 1.

    It holds the model itself and no copy.

    Args:
        model: of any input and output.
        paths: dotted paths of the modules, whose outputs are feature maps (B, C, H, W), or
            hold them as ``MapLayout`` says.
        role: what errors call the model ("student").

    Attributes:
        levels: level -> path of its module inside this one.
        layouts: level -> how the module's output holds the map, where that is known
            (``learn_layouts``).

    Raises:
        ConfigError: a path that is none of the model's, or is given twice.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str], role: str):
        super().__init__()
        # of a compiled model as they are in the model
        known = {path.replace(_COMPILED, ""): path for path, _ in model.named_modules() if path}
        for path in paths:
            if path not in known:
                children = ", ".join(name for name, _ in model.named_children())
                raise ConfigError(
                    f"levels: the {role} {type(model).__name__} has no module "
                    f"{path!r}{near(path, list(known))} (it has: {children})"
                )
            if list(paths).count(path) > 1:
                raise ConfigError(f"levels: module {path!r} of the {role} is given more than once")
        self.model = model
        self.levels = {number: f"model.{known[path]}" for number, path in enumerate(paths, start=1)}
        self.layouts: dict[int, MapLayout] = {}
        self._role = role

    def path(self, level: int) -> str:
        """Return the path of a level's module, as the model's owner names it."""
        return self.levels[level].removeprefix("model.").replace(_COMPILED, "")

    def forward(self, *arguments: Any) -> Any:
        """Return what the model does."""
        return self.model(*arguments)

    def learn_layouts(
        self, outputs: Mapping[int, Any], image_size: tuple[int, int]
    ) -> dict[int, tuple[int, int, int]]:
        """Learn how the modules' outputs hold feature maps; return level -> (C, H, W).

        Args:
            outputs: level -> what its module gave for some images.
            image_size: height and width of those in pixels.

        Raises:
            ConfigError: an output holds no feature map.
        """
        shapes = {}
        for level in self.levels:
            output = outputs.get(level)
            shape = tuple(output.shape) if isinstance(output, Tensor) else ()
            layout = find_layout(shape, image_size)
            if layout is None and len(shape) == 4:
                # a map that its owner names may have any proportions
                layout = MapLayout()
            if layout is None:
                raise ConfigError(
                    f"levels: module {self.path(level)!r} of the {self._role} gives "
                    f"{shape or type(output).__name__}, not a feature map (B, C, H, W) or tokens "
                    "(B, N, C) of a grid; name a module that does"
                )
            self.layouts[level] = layout
            shapes[level] = layout.shape(shape)
        return shapes
