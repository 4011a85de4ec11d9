"""Mean and standard deviation of a data set's channels.

Shapes: N rows of a window, C channels (3), S side of the square model input.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from raygkd.data.plan import Rows, cut_windows, shuffled
from raygkd.data.windows import Sampler, load_window
from raygkd.errors import DataError

if TYPE_CHECKING:
    from raygkd.data.parquet import ImageTable

SAMPLED_IMAGES = 4096
SMALLEST_STD = 1e-3
WINDOW_ROWS = 256

Channels = tuple[float, float, float]


def channel_statistics(
    table: ImageTable,
    rows: Rows,
    transform: Sampler,
    *,
    limit: int = SAMPLED_IMAGES,
    skip_bad: bool = False,
) -> tuple[Channels, Channels]:
    """Return mean and standard deviation of red, green and blue, on the scale 0 to 1.

    Computed exactly (in integers) from the same sample of images every time.

    Args:
        table: where the images lie.
        rows: the training rows.
        transform: the evaluation transform: statistics are of what the model sees.
        limit: most images to read.
        skip_bad: leave out broken images instead of stopping.

    Returns:
        Means, and standard deviations of at least 0.001, so that dividing by them is safe where a
        channel is constant.

    Raises:
        DataError: a broken image without ``skip_bad``, or no good image.
    """
    sample = shuffled(rows, table.units.first, seed=0)[:limit]
    pixels, total_C, squares_C = 0, np.zeros(3, np.int64), np.zeros(3, np.int64)
    for window in cut_windows(sample, WINDOW_ROWS):
        loaded = load_window(
            table, window, transform, seed=0, epoch=0, skip_bad=skip_bad, exact=False
        )
        images_NCSS = loaded.arrays["image"].astype(np.int64)
        pixels += images_NCSS.size // 3
        total_C += images_NCSS.sum(axis=(0, 2, 3))
        squares_C += (images_NCSS**2).sum(axis=(0, 2, 3))
    if pixels == 0:
        raise DataError(f"none of {len(sample)} sampled images of '{table.path}' can be decoded")
    mean_C = total_C / pixels
    std_C = np.sqrt(np.maximum(squares_C / pixels - mean_C**2, 0))
    red, green, blue = (mean_C / 255).tolist()
    std_red, std_green, std_blue = np.maximum(std_C / 255, SMALLEST_STD).tolist()
    return (red, green, blue), (std_red, std_green, std_blue)
