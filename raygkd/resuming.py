"""Going on with a run that was broken off: which one, by which settings, and on the same things."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raygkd import config as configuration
from raygkd.config import Config
from raygkd.errors import ConfigError
from raygkd.files import write_text

CONFIG = "config.yaml"
RESULT = "result.json"
FACTS = "facts.json"
# where and how fast a run goes on, and not what it does
_FREE = {"address", "max_concurrent", "max_failures", "cpus_per_worker", "cache_mb"}
_PATHS = {"data_dir", "output", "space", "teacher", "teacher_weights", "student_weights"}


def run_folder(place: str, command: str) -> Path:
    """Return the absolute folder of the run to go on with.

    Args:
        place: the folder of a run, or an output folder, whose newest run that has no result is
            taken.
        command: that made the run; runs are named after theirs.

    Raises:
        ConfigError: there is no such run.
    """
    folder = Path(place).expanduser().resolve()
    if (folder / "runs").is_dir():
        runs = [path.parent for path in (folder / "runs").glob(f"{command}-*/{FACTS}")]
        unfinished = sorted(run for run in runs if not (run / RESULT).exists())
        if not unfinished:
            raise ConfigError(
                f"--resume {place}: holds no run of 'raygkd {command}' that was broken off"
            )
        return unfinished[-1]
    for name in (CONFIG, FACTS):
        if not (folder / name).is_file():
            raise ConfigError(
                f"--resume {place}: holds no {name}; give an output folder, or the folder of a "
                "run, which is in OUTPUT/runs"
            )
    if not folder.name.startswith(f"{command}-"):
        raise ConfigError(
            f"--resume {place}: is no run of 'raygkd {command}' (their names start with "
            f"{command}-): use the command that made it"
        )
    return folder


def own_config(folder: Path, asked: Mapping[str, Any]) -> Config:
    """Return the configuration of a run, as far as it may be with what is asked for now.

    Args:
        folder: of the run.
        asked: setting -> value.

    Raises:
        ConfigError: what is asked for is not what the run has, a line for each difference.
    """
    path = folder / CONFIG
    own = configuration.from_yaml(path.read_text(), where=str(path))
    known = configuration.settings()
    problems = []
    free = {}
    for name, given in asked.items():
        section, _, kind = known[name]
        value = configuration.coerce(name, kind, given)
        before = getattr(getattr(own, section), name)
        if name in _FREE:
            free[name] = value
        elif value != before and not (name in _PATHS and _absolute(value) == before):
            problems.append(
                f"{configuration.flag(name)}: is {value} and was {before} when the run began: "
                "leave it out, or begin another run"
            )
    if problems:
        raise ConfigError("\n".join(problems))
    return configuration.with_settings(own, free)


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def note_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write down what a run rests on.

    Args:
        folder: of the run.
        facts: what it is -> plain value, as JSON has it.
    """
    write_text(folder / FACTS, json.dumps(facts, indent=2))


def check_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Refuse to go on with a run on something else than it rests on.

    Raises:
        ConfigError: something has changed, a line for each difference.
    """
    before = json.loads((folder / FACTS).read_text())
    # as they are read from the file
    now = json.loads(json.dumps(facts))
    names = [*before, *(name for name in now if name not in before)]
    changed = [
        f"--resume: {name}: is {now.get(name, 'missing')} and was {before.get(name, 'missing')} "
        "when the run began: put it back, or begin another run"
        for name in names
        if now.get(name) != before.get(name)
    ]
    if changed:
        raise ConfigError("\n".join(changed))
