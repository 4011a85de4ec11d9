"""How the output of a module holds a feature map: as (B, C, H, W), channels last, or as tokens.

Shapes: B batch, C channels, H height, W width, N tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from raygkd.errors import ConfigError

# class, distillation and register tokens that may stand before those of the grid
MOST_PREFIX_TOKENS = 16


@dataclass(frozen=True)
class MapLayout:
    """How to read a feature map (B, C, H, W) from a module's output.

    Attributes:
        order: of the output's dimensions, "BCHW", "BHWC" or "BNC".
        prefix_tokens: tokens before those of the grid; they are dropped.
        grid: H and W of the tokens where the layout was found. Images of another size have a
            square grid.
    """

    order: str = "BCHW"
    prefix_tokens: int = 0
    grid: tuple[int, int] | None = None

    def shape(self, output_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return (C, H, W) of the map in an output of this shape."""
        if self.order == "BCHW":
            _, channels, height, width = output_shape
        elif self.order == "BHWC":
            _, height, width, channels = output_shape
        else:
            _, tokens, channels = output_shape
            height, width = self._grid_of(tokens - self.prefix_tokens)
        return channels, height, width

    def read(self, output: Any) -> Tensor:
        """Return the map (B, C, H, W) in an output; it is a view where that is possible."""
        output = main_tensor(output)
        if self.order == "BCHW":
            return output
        if self.order == "BHWC":
            return output.permute(0, 3, 1, 2)
        tokens_BNC = output[:, self.prefix_tokens :]
        return tokens_BNC.transpose(1, 2).unflatten(2, self._grid_of(tokens_BNC.shape[1]))

    def _grid_of(self, tokens: int) -> tuple[int, int]:
        if self.grid is not None and math.prod(self.grid) == tokens:
            return self.grid
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ConfigError(
                f"{tokens} tokens do not form a square grid; use square images whose side is a "
                "multiple of the model's patch size"
            )
        return side, side


def main_tensor(output: Any) -> Any:
    """Return an output, or the first part of one that has several, as transformer blocks may."""
    return output[0] if isinstance(output, tuple | list) and output else output


def find_layout(output_shape: tuple[int, ...], image_size: tuple[int, int]) -> MapLayout | None:
    """Return the layout of an output that holds a map of an image; None where it holds none.

    A map with as many channels as it is wide is taken for (B, C, H, W).

    Args:
        output_shape: of the module's output.
        image_size: height and width in pixels; the map has about the same proportions.
    """
    ratio = image_size[0] / image_size[1]
    if len(output_shape) == 4:
        _, second, third, fourth = output_shape
        if _has_ratio(third, fourth, ratio):
            return MapLayout()
        return MapLayout("BHWC") if _has_ratio(second, third, ratio) else None
    if len(output_shape) != 3:
        return None
    for prefix_tokens in range(MOST_PREFIX_TOKENS + 1):
        tokens = output_shape[1] - prefix_tokens
        height = round(math.sqrt(tokens * ratio)) if tokens > 0 else 0
        if height > 1 and tokens % height == 0 and _has_ratio(height, tokens // height, ratio):
            return MapLayout("BNC", prefix_tokens, (height, tokens // height))
    return None


def _has_ratio(height: int, width: int, ratio: float) -> bool:
    """Return whether a grid has an image's proportions, up to a rounded side."""
    tolerance = 0.0 if ratio == 1.0 else max(1.0, ratio)
    return abs(height - width * ratio) <= tolerance
