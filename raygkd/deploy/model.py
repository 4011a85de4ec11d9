"""A model in use, whatever the format of its file.

Shapes: B batch, S side of the square input.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from raygkd.deploy.exporters.formats import format_of, readable_suffixes
from raygkd.deploy.facts import Facts, facts_of
from raygkd.deploy.modules import Run, on_device, student
from raygkd.errors import DataError
from raygkd.models import load_model_file, source_file
from raygkd.storage.atomic_files import Place, local_copy, place


def packed(path: Place) -> dict[str, bytes]:
    """Return name -> content of a model's file, first, and of what it needs beside it."""
    found = {path.name: path.read_bytes()}
    if format_of(path.name) is None:
        source = source_file(load_model_file(path).name)
        if source is not None:
            found[place(source).name] = place(source).read_bytes()
    return found


def unpacked(files: Mapping[str, bytes], folder: Path) -> Path:
    """Write what ``packed`` returned to a folder; return the path of the model's file."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder / next(iter(files))


def load_model(path: Place) -> tuple[Facts, Run]:
    """Return the facts of a model, and the model on this process's device.

    Args:
        path: path of a model file written by raygkd, or of an exported file in a readable format.

    Raises:
        DataError: the file does not exist or is neither.
        ConfigError: it needs a package that is not installed.
    """
    exported = format_of(path.name)
    if exported is not None and exported.unread:
        readable = " or ".join(readable_suffixes())
        raise DataError(
            f"{path} {exported.unread}; use the model file from which it was exported, or an "
            f"{readable} file"
        )
    if exported is not None:
        try:
            with local_copy(path) as local:
                return exported.read(local)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    model_file = load_model_file(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return facts_of(model_file), on_device(student(model_file).to(device), device)
