"""The interface of export formats; each format is a class in a file of this folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from raygkd.deploy.facts import Facts
from raygkd.deploy.modules import Run
from raygkd.models import ModelFile
from raygkd.registry import FORMATS


class ExportFormat(ABC):
    """A format of ``raygkd export``.

    ``@FORMATS.register(name)`` registers a subclass; the first line of its docstring is its
    description in ``--help``.

    Attributes:
        suffix: suffix of its files, such as ".onnx".
        packages: import names of the packages that it needs.
        opset: version of its operator set, if it has one.
        quantised: supported types of quantised weights: "int8".
        has_card: whether a model card is written beside the file.
        unread: why ``evaluate`` and ``predict`` cannot read its files; empty if they can.
    """

    suffix: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    opset: ClassVar[int | None] = None
    quantised: ClassVar[tuple[str, ...]] = ()
    has_card: ClassVar[bool] = False
    unread: ClassVar[str] = ""

    @abstractmethod
    def write(self, model_file: ModelFile, path: Path) -> Run:
        """Write a model; return the model as loaded from the file."""

    def quantise(self, source: Path, path: Path) -> Run:
        """Write a file with quantised weights; return the model as loaded from it.

        Args:
            source: the file written by ``write``.
            path: path of the new file.
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
