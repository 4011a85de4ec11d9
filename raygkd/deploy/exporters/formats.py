"""The interface of export formats; each format is a class in a file of this folder.

Shapes: B batch, S side of the square input.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from raygkd.deploy.facts import Facts
from raygkd.deploy.modules import Run
from raygkd.models import ModelFile
from raygkd.optional_packages import EXPORT
from raygkd.registry import FORMATS


class Calibrated(ABC):
    """A model with the ranges of its activations, ready to be written in 8 bits.

    Attributes:
        layers: names of the layers that can be quantised.
    """

    layers: tuple[str, ...]

    @abstractmethod
    def write(self, path: Path, float_layers: Collection[str] = ()) -> Run:
        """Write the quantised file; return the model as loaded from it.

        Args:
            path: path of the new file.
            float_layers: names of layers that are not quantised.
        """

    @abstractmethod
    def errors(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """Return layer -> relative error of its output, in 0..1, if it alone is quantised.

        Args:
            batches: images (B, 3, S, S) in 0..1.
        """


class ExportFormat(ABC):
    """A format of ``raygkd export``.

    ``@FORMATS.register(name)`` registers a subclass; the first line of its docstring is its
    description in ``--help``.

    Attributes:
        suffix: suffix of its files, such as ".onnx".
        beside: suffixes of the files that it writes beside each, in the place of ``suffix``.
        packages: import names of the packages that it needs.
        extra: extra of raygkd that installs them.
        opset: version of its operator set, if it has one.
        quantised: supported kinds of quantisation: "int8" (with calibration images; ``calibrate``)
            and "dynamic" (``quantise``).
        has_card: whether a model card is written beside the file.
        unread: why ``evaluate`` and ``predict`` cannot read its files; empty if they can.
    """

    suffix: ClassVar[str]
    beside: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = EXPORT
    opset: ClassVar[int | None] = None
    quantised: ClassVar[tuple[str, ...]] = ()
    has_card: ClassVar[bool] = False
    unread: ClassVar[str] = ""

    @abstractmethod
    def write(self, model_file: ModelFile, path: Path) -> Run:
        """Write a model; return the model as loaded from the file."""

    def names(self, name: str) -> list[str]:
        """Return the names of all files of a model: the one with ``suffix``, and those beside."""
        stem = name.removesuffix(self.suffix)
        return [name, *(f"{stem}{suffix}" for suffix in self.beside)]

    def calibrate(
        self, model_file: ModelFile, source: Path, batches: Iterable[Tensor], folder: Path
    ) -> Calibrated:
        """Find the ranges of a model's activations.

        Args:
            model_file: of the model; its ``ranges``, if any, are those that it was trained with.
            source: the file written by ``write``.
            batches: calibration images (B, 3, S, S) in 0..1.
            folder: for temporary files; exists as long as the result is used.

        Raises:
            ConfigError: the model cannot be quantised.
        """
        raise NotImplementedError

    def quantise(self, source: Path, path: Path) -> Run:
        """Write a file with 8-bit weights, and activations quantised at run time.

        Args:
            source: the file written by ``write``.
            path: path of the new file.

        Returns:
            The model as loaded from the new file.
        """
        raise NotImplementedError

    def read(self, path: Path) -> tuple[Facts, Run]:
        """Return the facts of the model in a file, and the model.

        Raises:
            DataError: the file is damaged or has another format.
        """
        raise NotImplementedError


def format_of(path: str | Path) -> ExportFormat | None:
    """Return the format of a file by its suffix; None if no format has this suffix."""
    formats = (FORMATS.get(name)() for name in FORMATS.names())
    return next((entry for entry in formats if str(path).endswith(entry.suffix)), None)


def readable_suffixes() -> list[str]:
    """Return the suffixes of the files that ``evaluate`` and ``predict`` read."""
    formats = [FORMATS.get(name) for name in FORMATS.names()]
    return [entry.suffix for entry in formats if not entry.unread]
