"""How well the confidence of a model matches its accuracy.

Shapes: N predictions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 15


def calibration(confidence_N: NDArray[np.floating], right_N: NDArray[np.bool_]) -> dict[str, Any]:
    """Return how far a model's confidence is from its share of right predictions.

    Args:
        confidence_N: confidence of each prediction, in 0..1; NaN counts as 0.
        right_N: whether the prediction was right.

    Returns:
        "count", N; "ece", the expected calibration error: the mean over all predictions of the
        distance between mean confidence and share of right ones in the prediction's bin, in 0..1,
        None without predictions; "bins", from low to high those of ``BINS`` equal parts of 0..1
        that have a prediction, each with "from", "to", "count", "confidence" and "right".

    Source: Guo et al., On Calibration of Modern Neural Networks, arXiv 1706.04599.
    """
    confidence_N = np.nan_to_num(confidence_N.astype(np.float64))
    # (0, 1/15], (1/15, 2/15], ...; 0 belongs to the first
    number_N = np.clip(np.ceil(confidence_N * BINS).astype(int) - 1, 0, BINS - 1)
    bins = []
    for number in np.unique(number_N).tolist():
        inside_N = number_N == number
        bins.append(
            {
                "from": number / BINS,
                "to": (number + 1) / BINS,
                "count": int(inside_N.sum()),
                "confidence": float(confidence_N[inside_N].mean()),
                "right": float(right_N[inside_N].mean()),
            }
        )
    total = len(confidence_N)
    apart = sum(one["count"] * abs(one["confidence"] - one["right"]) for one in bins)
    return {"count": total, "ece": apart / total if total else None, "bins": bins}
