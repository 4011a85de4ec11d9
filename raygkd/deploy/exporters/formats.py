"""What a format that models are exported to must say and do; each is a class in a file here."""

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

    ``@FORMATS.register(name)`` enters a subclass, and the first line of its documentation is what
    ``--help`` says of it.

    Attributes:
        suffix: of its files, such as ".onnx".
        packages: that it needs, as they are imported.
        opset: version of its operators, where it has one.
        quantised: what its weights can be quantised to, of "int8".
        has_card: whether a model card is written beside the file.
        unread: why ``evaluate`` and ``predict`` do not read its files; empty where ``read`` does.
    """

    suffix: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    opset: ClassVar[int | None] = None
    quantised: ClassVar[tuple[str, ...]] = ()
    has_card: ClassVar[bool] = False
    unread: ClassVar[str] = ""

    @abstractmethod
    def write(self, model_file: ModelFile, path: Path) -> Run:
        """Write a model; return it as it runs from what was written."""

    def quantise(self, source: Path, path: Path) -> Run:
        """Write a file of this format with quantised weights; return it as it runs.

        Args:
            source: the file that ``write`` wrote.
            path: of the new file.
        """
        raise NotImplementedError

    def read(self, path: Path) -> tuple[Facts, Run]:
        """Return what is known of the model in a file, and the model.

        Raises:
            DataError: the file is damaged or none of this format.
        """
        raise NotImplementedError


def format_of(path: str | Path) -> ExportFormat | None:
    """Return the format that a file's suffix stands for; None where it is none of them."""
    formats = (FORMATS.get(name)() for name in FORMATS.names())
    return next((one for one in formats if str(path).endswith(one.suffix)), None)


def readable_suffixes() -> list[str]:
    """Return the suffixes of the files that ``evaluate`` and ``predict`` read."""
    formats = [FORMATS.get(name) for name in FORMATS.names()]
    return [one.suffix for one in formats if not one.unread]
