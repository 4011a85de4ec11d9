"""Resume an interrupted run: find it, and check its settings, data and models."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raygkd import config as configuration
from raygkd.config import Config
from raygkd.errors import ConfigError, brief
from raygkd.storage.atomic_files import Place, is_remote, local_path, modified, place, write_text
from raygkd.storage.reading import read_bytes
from raygkd.workflows.moved_runs import move_files_along, old_output, with_moved_paths
from raygkd.workflows.run_files import read_json

CONFIG = "config.yaml"
RESULT = "result.json"
MODEL = "model.pt"
FACTS = "facts.json"
TRACKING = "tracking.jsonl"
INPUTS = "inputs"
# settings that may change when a run is resumed: where and how fast it runs
_FREE = {
    *("address", "wait_minutes", "max_concurrent", "max_failures", "cpus_per_worker", "cache_mb"),
    "time_budget",
}
_NOTHING_BEGUN = "nothing was begun before it was killed; run the command again without --resume"
# what Ray sets for the driver of a job
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_PATHS = {
    *("data_dir", "output", "space", "teacher", "student", "teacher_weights", "student_weights"),
    *("warm_start", "start_from", "teacher_classes", "class_names", "prompts", "unlabelled"),
}


def new_run_folder(output: Place, command: str, name: str | None) -> Place:
    """Return the folder of a new run, without creating it.

    Args:
        output: folder of all runs.
        command: of the run.
        name: of the run; None for a new unique one.
    """
    if name is None:
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        name = f"{stamp}-{secrets.token_hex(2)}"
    return output / "runs" / f"{command}-{name}"


def named_run_folder(config: Config, command: str) -> Place | None:
    """Return the absolute folder of the run with this name; None if there is none to resume."""
    if config.output.name is None:
        return None
    folder = new_run_folder(place(config.output.output), command, config.output.name)
    return folder if (folder / FACTS).exists() else None


def run_folder(given: str, command: str) -> Place:
    """Return the absolute folder of the run to resume.

    Args:
        given: the folder of a run, or an output folder for its newest unfinished run.
        command: that started the run; run folders are named after it.

    Raises:
        ConfigError: there is no such run.
        StorageError: the store cannot be read.
    """
    try:
        folder = place(given)
    except ConfigError as error:
        raise ConfigError(f"--resume {error}") from error
    if (folder / "runs").is_dir():
        runs = [run for run in (folder / "runs").iterdir() if run.name.startswith(f"{command}-")]
        unfinished = [run for run in runs if (run / FACTS).exists() and not (run / RESULT).exists()]
        if not unfinished:
            begun = any((run / FACTS).exists() for run in runs)
            raise ConfigError(
                f"--resume {given}: has no interrupted run of 'raygkd {command}'"
                + ("" if begun or not runs else f" ({_NOTHING_BEGUN})")
            )
        return max(unfinished, key=lambda run: modified(run / FACTS))
    is_run = folder.parent.name == "runs" and "-" in folder.name
    if is_run and folder.exists() and not (folder / FACTS).exists():
        raise ConfigError(f"--resume {given}: {_NOTHING_BEGUN}")
    for name in (CONFIG, FACTS):
        if not (folder / name).exists():
            raise ConfigError(
                f"--resume {given}: has no {name}; pass an output folder, or the folder of a run, "
                "which is in OUTPUT/runs"
            )
    if not folder.name.startswith(f"{command}-"):
        raise ConfigError(
            f"--resume {given}: is not a run of 'raygkd {command}' (their names start with "
            f"{command}-); use the command that started it"
        )
    return folder


def own_config(folder: Place, asked: Mapping[str, Any]) -> Config:
    """Return the configuration of a run, updated with those given settings that may change.

    Args:
        folder: of the run.
        asked: setting -> value.

    Raises:
        ConfigError: given settings that differ from those of the run, one line each.
    """
    path = folder / CONFIG
    own = with_moved_paths(configuration.read_run_config(path), folder)
    known = configuration.settings()
    problems = []
    free = {}
    for name, given in asked.items():
        _, _, kind = known[name]
        value = configuration.coerce(name, kind, given)
        before = configuration.value_of(own, name)
        if name in _FREE:
            free[name] = value
        elif value != before and before not in _lasting(name, value, place(own.output.output)):
            problems.append(
                f"{configuration.flag(name)}: is {value}, but was {before} when the run started; "
                "omit it, or start another run"
            )
    if problems:
        raise ConfigError("\n".join(problems))
    return configuration.with_settings(own, free)


def lasting_name(name: str, output: Place) -> str:
    """Return a model's name that stays valid wherever the run is resumed, and on every node.

    FILE.py of FILE.py:FUNCTION is copied into the output folder's inputs; of hf:FOLDER,
    and folders and files of other families, the absolute path is taken.

    Args:
        name: of a model, no file of one.
        output: the output folder.

    Raises:
        ConfigError: FILE.py cannot be read.
    """
    # needs torch, which help does without
    from raygkd.models import source_file

    source = source_file(name)
    if source is not None:
        return f"{_copy_of(place(source), output)}:{name.rpartition(':')[2]}"
    prefix, colon, path = name.partition(":")
    if prefix in ("hf", "hf-clip", "open_clip") and colon and local_path(path).is_dir():
        return f"{prefix}:{lasting_path(path, output)}"
    if prefix == "open_clip" and ":" in path:
        architecture, _, file = path.partition(":")
        return f"{prefix}:{architecture}:{lasting_path(file, output)}"
    return name


def _copy_of(path: Place, output: Place) -> Place:
    """Return the path of a file's copy in the output folder's inputs, which need not be there."""
    if path.parent == output / INPUTS:
        return path
    try:
        content = read_bytes(path)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    return output / INPUTS / f"{hashlib.sha256(content).hexdigest()[:16]}-{path.name}"


def lasting_path(path: str, output: Place) -> str:
    """Return a path that stays valid wherever the run is resumed.

    It is the absolute path, or the URL. A file that was uploaded with a Ray job is in a temporary
    folder, so its path is that of a copy in the output folder's inputs.

    Args:
        path: of a file or folder, or a URL.
        output: the output folder.
    """
    if is_remote(path):
        return path.rstrip("/")
    absolute = Path(os.path.abspath(local_path(path)))
    if _JOB in os.environ and absolute.is_relative_to(Path.cwd()) and absolute.is_file():
        digest = hashlib.sha256(read_bytes(absolute)).hexdigest()[:16]
        return str(output / INPUTS / f"{digest}-{absolute.name}")
    return str(absolute)


def _lasting(name: str, value: Any, output: Place) -> tuple[Any, ...]:
    """Return what a given setting may be called in the run's own configuration."""
    if name == "students" and value is not None:
        return (tuple(lasting_name(one, output) for one in value),)
    if name not in _PATHS or not isinstance(value, str):
        return ()
    return lasting_path(value, output), lasting_name(value, output)


def note_facts(folder: Place, facts: Mapping[str, Any]) -> None:
    """Write the facts that a run depends on.

    Args:
        folder: of the run.
        facts: name -> plain JSON value.
    """
    write_text(folder / FACTS, json.dumps(facts, indent=2))


def check_facts(folder: Place, facts: Mapping[str, Any]) -> str | None:
    """Refuse to resume a run whose data or models have changed.

    Returns:
        the output folder that the run was moved from; None if it was not moved.

    Raises:
        ConfigError: something has changed, one line for each difference.
    """
    moved = old_output(configuration.read_run_config(folder / CONFIG), folder)
    if moved is not None:
        move_files_along(folder, moved)
    before = read_json(folder / FACTS)
    # as they are read from the file
    now = json.loads(json.dumps(facts))
    names = [*before, *(name for name in now if name not in before)]
    changed = [
        f"--resume: {name}: is {_told(now, name)} and was {_told(before, name)} "
        "when the run started; restore it, or start another run"
        for name in names
        if now.get(name) != before.get(name)
    ]
    if changed:
        raise ConfigError("\n".join(changed))
    return moved


def _told(facts: Mapping[str, Any], name: str) -> str:
    return brief(facts[name], quoted=False) if name in facts else "missing"
