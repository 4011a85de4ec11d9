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
# of the images of a window, of one byte for each pixel and channel
WINDOW_BYTES = 256 * 2**20

Channels = tuple[float, float, float]


def channel_statistics(
    table: ImageTable,
    rows: Rows,
    transform: Sampler,
    *,
    limit: int = SAMPLED_IMAGES,
    skip_bad: bool = False,
) -> tuple[Channels, Channels]:
    """Return mean and standard deviation of red, green and blue, in 0..1.

    They are computed exactly, in integers, from a fixed sample of images.

    Args:
        table: table of the images.
        rows: the training rows.
        transform: the evaluation transform, because the statistics are those of the model's input.
        limit: maximum number of images to read.
        skip_bad: skip unreadable images instead of stopping.

    Returns:
        means, and standard deviations of at least 0.001, by which constant channels can be divided.

    Raises:
        DataError: an image is unreadable and ``skip_bad`` is off, or all images are unreadable.
    """
    sample = shuffled(rows, table.units.first, seed=0)[:limit]
    bytes_of_row = transform.blank()["image"].nbytes
    rows_of_window = max(1, min(WINDOW_ROWS, WINDOW_BYTES // bytes_of_row))
    pixels, total_C, squares_C = 0, np.zeros(3, np.int64), np.zeros(3, np.int64)
    for window in cut_windows(sample, rows_of_window):
        loaded = load_window(
            table, window, transform, seed=0, epoch=0, skip_bad=skip_bad, exact=False
        )
        # one at a time: as integers of 64 bits they take eight times the memory
        for image_CSS in loaded.arrays["image"]:
            image_CN = image_CSS.reshape(3, -1).astype(np.int64)
            pixels += image_CN.shape[1]
            total_C += image_CN.sum(axis=1)
            squares_C += (image_CN**2).sum(axis=1)
    if pixels == 0:
        raise DataError(f"none of {len(sample)} sampled images in '{table.path}' can be decoded")
    mean_C = total_C / pixels
    std_C = np.sqrt(np.maximum(squares_C / pixels - mean_C**2, 0))
    red, green, blue = (mean_C / 255).tolist()
    std_red, std_green, std_blue = np.maximum(std_C / 255, SMALLEST_STD).tolist()
    return (red, green, blue), (std_red, std_green, std_blue)
