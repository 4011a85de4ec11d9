"""A model in use, whatever the format of its file.

Shapes: B batch, S side of the square input.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from raygkd.deploy.exporters.formats import format_of, readable_suffixes
from raygkd.deploy.facts import Facts, facts_of
from raygkd.deploy.modules import Run, on_device, student
from raygkd.errors import DataError
from raygkd.models import load_model_file, source_file
from raygkd.storage.atomic_files import Place, place, require_regular
from raygkd.storage.temporary import temporary_folder


def files_of(path: Place) -> list[Place]:
    """Return the paths of all files of a model, that of its own first."""
    exported = format_of(path.name)
    return [path] if exported is None else [path.parent / one for one in exported.names(path.name)]


def packed(path: Place) -> dict[str, bytes]:
    """Return name -> content of a model's file, first, and of what it needs beside it."""
    found = {one.name: one.read_bytes() for one in files_of(path)}
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
            with _local_copy(path) as local:
                return exported.read(local)
        except OSError as error:
            which = error.filename if error.filename and isinstance(path, Path) else path
            raise DataError(f"cannot read {which}: {error.strerror or error}") from error
    model_file = load_model_file(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return facts_of(model_file), on_device(student(model_file).to(device), device)


@contextlib.contextmanager
def _local_copy(path: Place) -> Iterator[Path]:
    """Yield the path of an exported file on this machine, with the files beside it.

    Raises:
        OSError: one does not exist, or is not a regular file.
    """
    if isinstance(path, Path):
        for one in files_of(path):
            assert isinstance(one, Path)
            require_regular(one)
        yield path
        return
    with temporary_folder("files") as folder:
        yield unpacked(packed(path), folder)
