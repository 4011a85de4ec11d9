"""Models of other libraries that give their feature maps themselves.

Shapes: B batch, C channels, H height, W width, N tokens, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class MappedModel(nn.Module):
    """A model whose levels are maps that its library works out.

    Each map goes through a module of its own that does nothing, where a hook sees it.

    Args:
        net: the library's model.
        levels: the number of levels.

    Attributes:
        maps: level as a string -> the module whose output is the level's map (B, C, H, W).
    """

    def __init__(self, net: nn.Module, levels: int):
        super().__init__()
        self.net = net
        self.maps = nn.ModuleDict({str(number): nn.Identity() for number in range(1, levels + 1)})

    @property
    def level_paths(self) -> dict[int, str]:
        """Level -> path of its module."""
        return {int(number): f"maps.{number}" for number in self.maps}

    def show(self, maps: Mapping[int, Tensor]) -> None:
        """Hand level -> map (B, C, H, W) to the modules of the levels."""
        for number, map_BCHW in maps.items():
            self.maps[str(number)](map_BCHW)


def as_map(tokens: Tensor, like_BCHW: Tensor, prefix: int) -> Tensor | None:
    """Return the output of a model's last norm as a map; None where it is of other shape.

    Args:
        tokens: (B, C, H, W), (B, H, W, C) or (B, N, C) with other tokens before those of the map.
        like_BCHW: a map of the shape that is wanted.
        prefix: the number of tokens before those of the map.
    """
    if tokens.shape == like_BCHW.shape:
        return tokens
    channels, height, width = like_BCHW.shape[1:]
    if tokens.shape[1:] == (height, width, channels):
        return tokens.permute(0, 3, 1, 2)
    if tokens.shape[1:] == (prefix + height * width, channels):
        return tokens[:, prefix:].transpose(1, 2).reshape(like_BCHW.shape)
    return None
