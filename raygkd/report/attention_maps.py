"""Report section on the teacher's attention.

Shape letters: B images, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raygkd.report.figures import new_figure, save
from raygkd.report.page import Picture, Section

HEAT = "plasma"
# characters of a class below an image
LONGEST_NAME = 16


def attention_section(
    folder: Path,
    images: Sequence[NDArray[np.uint8]],
    names: Sequence[str],
    masks: Mapping[int, NDArray[np.float32]],
    temperature: float,
) -> Section:
    """Return the section on the teacher's attention, with its picture drawn.

    Args:
        folder: for the picture.
        images: RGB (H, W, 3) each.
        names: of each image.
        masks: level -> spatial attention (B, H, W), averaging to 1 over an image.
        temperature: T of the attention.
    """
    path = folder / "attention.png"
    draw_attention(path, images, names, masks)
    highest = {str(level): float(masks_BHW.max()) for level, masks_BHW in masks.items()}
    return Section(
        anchor="attention",
        title="Where the teacher looks",
        blocks=[
            Picture(
                path,
                "Attention masks",
                "The teacher's feature maps weigh the positions of an image, and the vertex loss "
                f"counts differences by these weights. They average to 1 over an image; bright "
                f"cells count most. The attention temperature is {temperature:.3g}: a higher one "
                "makes the masks flatter. Each level has its own scale, since deep levels see the "
                "image in few, large cells, and the colours resolve small weights more finely. The "
                "images are from the validation split.",
                is_wide=True,
            )
        ],
        numbers={"temperature": temperature, "largest_weight": highest},
    )


def draw_attention(
    path: Path,
    images: Sequence[NDArray[np.uint8]],
    names: Sequence[str],
    masks: Mapping[int, NDArray[np.float32]],
) -> None:
    """Write a PNG: a row of images, with their masks at each level below.

    Args:
        path: of the picture.
        images: RGB (H, W, 3) each.
        names: of each image.
        masks: level -> spatial attention (B, H, W).
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm

    figure = new_figure(0.4 + 1.15 * (1 + len(masks)))
    grid = figure.subplots(1 + len(masks), len(images), squeeze=False)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    for axes, image, name in zip(grid[0], images, names):
        axes.imshow(image, interpolation="nearest" if len(image) < 64 else "auto")
        axes.set_title(shortened(name), fontsize=9, parse_math=False)
    grid[0, 0].set_ylabel("image", fontsize=10)
    for row, (level, masks_BHW) in zip(grid[1:], masks.items()):
        # few cells have most of the weight at a low temperature
        norm = PowerNorm(0.5, 0, float(masks_BHW.max()))
        for axes, image, mask_HW in zip(row, images, masks_BHW):
            extent = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
            axes.imshow(image.mean(2), cmap="gray", extent=extent)
            heat_HW4 = colormaps[HEAT](norm(mask_HW))
            # the image shows where there is little weight
            heat_HW4[..., 3] = 0.25 + 0.6 * norm(mask_HW)
            axes.imshow(heat_HW4, extent=extent)
        height, width = masks_BHW.shape[1:]
        row[0].set_ylabel(f"level {level}\n{height}x{width} cells", fontsize=10)
        bar = figure.colorbar(ScalarMappable(norm, HEAT), ax=row, aspect=12, pad=0.01)
        bar.set_label("weight", fontsize=9)
        bar.ax.tick_params(labelsize=8)
    save(figure, path)


def shortened(name: str) -> str:
    """Return the name of a class, truncated so that it does not touch the next one."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
