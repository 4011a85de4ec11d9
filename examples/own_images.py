"""Search for a student on images that your program already has, as torch data sets.

    python examples/own_images.py

Replace the two data sets with your own. Their items are (image, label), with images as they are,
before augmentation and normalisation. A Ray Dataset with the columns "image" and "label" works
as well.
"""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits  # type: ignore[import-untyped]

import raygkd


def main() -> None:
    """Search, and print the verdict and the trials."""
    digits = load_digits()
    pixels = (digits.images / 16 * 255).astype(np.uint8)  # (1797, 8, 8)
    items = list(zip(pixels, digits.target, strict=True))
    images = raygkd.Images(
        train=items[:1400], test=items[1400:], class_names=[str(name) for name in range(10)]
    )
    run = raygkd.tune(
        data=images,
        teacher="resnet20",
        teacher_epochs=4,
        student="resnet8",
        epochs=2,
        trials=3,
        space={"lr": {"loguniform": [0.02, 0.2]}, "alpha": [1.0, 3.0]},
    )
    print(run.result["verdict"]["line"])
    print(run.trials.to_string(index=False))
    print("report:", run.report())


# Ray's workers import this file
if __name__ == "__main__":
    main()
