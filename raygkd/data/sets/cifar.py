"""CIFAR-10 and CIFAR-100, as their authors' files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raygkd.data.sources import DataSet, Sample, Source, SourceOptions, array_sample, needed_folder
from raygkd.errors import DataError
from raygkd.registry import DATASETS


@DATASETS.register("cifar10")
class Cifar10(DataSet):
    """Photographs of 10 classes, see ``_cifar``."""

    task = "classification"
    can_fetch = True

    @classmethod
    def recognise(cls, root: Path) -> str | None:
        """Return the folder that the package has."""
        return "cifar-10-batches-py" if (root / "cifar-10-batches-py").is_dir() else None

    def open(self, options: SourceOptions) -> Source:
        """Return the photographs."""
        from torchvision.datasets import CIFAR10

        return _cifar("cifar10", CIFAR10, options)


@DATASETS.register("cifar100")
class Cifar100(DataSet):
    """Photographs of 100 classes, see ``_cifar``."""

    task = "classification"
    can_fetch = True

    @classmethod
    def recognise(cls, root: Path) -> str | None:
        """Return the folder that the package has."""
        return "cifar-100-python" if (root / "cifar-100-python").is_dir() else None

    def open(self, options: SourceOptions) -> Source:
        """Return the photographs."""
        from torchvision.datasets import CIFAR100

        return _cifar("cifar100", CIFAR100, options)


def _cifar(name: str, loader: Any, options: SourceOptions) -> Source:
    """Photographs of 32x32 pixels (Krizhevsky 2009), with the test split they come with."""
    root = needed_folder(name, options)
    samples: list[Sample] = []
    for split in ("train", "test"):
        try:
            data = loader(root, train=split == "train", download=options.download)
        except (OSError, RuntimeError) as error:
            if options.download:
                raise DataError(f"{name} cannot be downloaded into '{root}': {error}") from error
            raise DataError(
                f"no complete {loader.base_folder} in '{root}'; set --data-dir to the folder that "
                "contains it, or pass --download"
            ) from error
        samples += (
            array_sample(image_HWC, label, split, f"{name} {split} {index}")
            for index, (image_HWC, label) in enumerate(zip(data.data, data.targets, strict=True))
        )
    return Source(name, tuple(data.classes), samples)
