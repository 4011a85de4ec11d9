"""An interrupted run whose output folder was moved, copied or restored is resumed where it is."""

from __future__ import annotations

import json
from typing import Any

from raygkd import config as configuration
from raygkd.config import Config
from raygkd.storage.atomic_files import Place, place, whole_file
from raygkd.storage.object_store import RemotePath

# files of a run that hold paths
_WITH_PATHS = ("facts.json", "trials.jsonl", "tracking.jsonl")


def old_output(config: Config, folder: Place) -> str | None:
    """Return the output folder that a run was in; None if it is still there.

    A run's folder that was taken out of its output folder belongs to the old one.

    Args:
        config: as the run's folder has it.
        folder: of the run.
    """
    before = config.output.output
    is_there = folder.parent.name != "runs" or place(before) == folder.parent.parent
    return None if is_there else before


def with_moved_paths(config: Config, folder: Place) -> Config:
    """Return a run's configuration with paths in the output folder as they are now.

    Args:
        config: as the run's folder has it.
        folder: of the run.
    """
    old = old_output(config, folder)
    if old is None:
        return config
    new = str(folder.parent.parent)

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: moved(one) for name, one in value.items()}
        if isinstance(value, list | tuple):
            return [moved(one) for one in value]
        return _replaced(value, old, new) if isinstance(value, str) else value

    return configuration.from_mapping(moved(configuration.to_mapping(config)), where=str(folder))


def move_files_along(folder: Place, old: str) -> None:
    """Replace the old output folder in the files of a run, which this process owns.

    Args:
        folder: of the run.
        old: see ``old_output``.
    """
    new = str(folder.parent.parent)
    # as they are in a JSON string
    old, new = json.dumps(old)[1:-1], json.dumps(new)[1:-1]
    for name in _WITH_PATHS:
        for path in _parts(folder / name):
            text = path.read_text()
            if (replaced := _replaced(text, old, new)) != text:
                with whole_file(path) as temporary:
                    temporary.write_text(replaced)


def _parts(path: Place) -> list[Place]:
    """Return the files of a file or, in an object store, of a journal."""
    if isinstance(path, RemotePath):
        return [*path.iterdir()] or ([path] if path.exists() else [])
    return [path] if path.exists() else []


def _replaced(text: str, old: str, new: str) -> str:
    return new if text == old else text.replace(f"{old}/", f"{new}/")
