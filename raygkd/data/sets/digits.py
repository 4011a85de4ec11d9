"""The handwritten digits that come with scikit-learn, as a data set."""

from __future__ import annotations

from raygkd.data.sklearn_digits import load_digits
from raygkd.data.sources import DataSet, Source, SourceOptions, array_sample
from raygkd.registry import DATASETS


@DATASETS.register("digits")
class DigitsSet(DataSet):
    """The digits of ``load_digits``; images must not be mirrored."""

    task = "classification"
    reads_folder = False
    augment = "crop"

    def open(self, options: SourceOptions) -> Source:
        """Return the digits as images."""
        digits = load_digits()
        samples = [
            array_sample(image_HW, int(label), "test" if is_test else "train", f"digits {index}")
            for index, (image_HW, label, is_test) in enumerate(
                zip(digits.images_BHW, digits.label, digits.is_test)
            )
        ]
        return Source("digits", tuple("0123456789"), samples)
