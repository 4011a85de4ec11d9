"""The handwritten digits that come with scikit-learn.

Shapes: B images.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raygkd.data.seeds import generator
from raygkd.data.splits import choose

TEST_FRACTION = 0.2
SEED = 0


@dataclass(frozen=True, eq=False)
class Digits:
    """Handwritten digits, 8x8 grey (Alpaydin and Kaynak 1998).

    Attributes:
        images_BHW: uint8 (B, 8, 8).
        label: the digit (B,).
        is_test: a fifth of them, stratified (B,).
    """

    images_BHW: NDArray[np.uint8]
    label: NDArray[np.int64]
    is_test: NDArray[np.bool_]


def load_digits() -> Digits:
    """Return the digits that come with scikit-learn.

    Its file is read as it does, a line for an image of 8 x 8 pixels in 0..16 with its label last:
    to import scikit-learn takes longer than to train on them.
    """
    package = find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    table = np.loadtxt(
        Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=","
    )
    images_BHW = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    label = table[:, -1].astype(np.int64)
    test = choose(
        np.arange(len(images_BHW)),
        label,
        round(TEST_FRACTION * len(images_BHW)),
        rng=generator(SEED),
    )
    is_test = np.zeros(len(images_BHW), dtype=bool)
    is_test[test] = True
    return Digits(images_BHW, label, is_test)
