"""A search that is killed at random moments, in every way there is."""

from __future__ import annotations

import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from commands import Command
from records import json_lines, run_ids, tracked
from scenes import TUNE, Scene

from raygkd.engine import read_checkpoint


@dataclass
class Killed:
    """A search that was killed several times.

    Attributes:
        folder: of its run.
        moments: how many lines the journal had, at least, and the seconds after that.
        behind: epochs that the journal had and the checkpoint of their trial had not, at each kill.
        over: trials that were over at each kill.
        starts: how often each had been started by then.
        run_ids: MLflow runs of the trials at each kill.
        seconds: until the command ended, or what ran its trials.
        warnings: what the last command wrote to standard error.
        result: of the last command.
    """

    folder: Path
    moments: list[tuple[int, float]]
    behind: list[int] = field(default_factory=list)
    over: list[set[str]] = field(default_factory=list)
    starts: list[list[str]] = field(default_factory=list)
    run_ids: list[dict[str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: str = ""
    result: dict[str, Any] = field(default_factory=dict)

    def look(self) -> None:
        """Note what there is."""
        entries = tracked(self.folder)
        ended = {entry["key"] for entry in entries if entry.get("status") == "FINISHED"}
        self.over.append({key for key in ended if key.startswith("trial-")})
        self.starts.append([entry["key"] for entry in entries if entry.get("op") == "start"])
        self.run_ids.append(run_ids(self.folder))
        journal = lines(self.folder)
        number = journal[-1]["trial"]
        told = journal[-1]["metrics"]["epoch"] if "metrics" in journal[-1] else 0
        path = self.folder / "trials" / f"{number:04d}" / "checkpoint.pt"
        self.behind.append(int(told) - (read_checkpoint(path)["epoch"] if path.exists() else 0))


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a search's journal."""
    return json_lines(folder / "trials.jsonl")


def kill(scene: Scene) -> Killed:
    """Kill the driver, end it by Ctrl-C twice, kill all there is, and a trial; each once."""
    output = scene.folder("killed")
    # the journal has 34 lines in the end
    windows = ((1, 10), (12, 20), (27, 29))
    moments = [(random.randint(*window), random.uniform(0.0, 0.3)) for window in windows]
    command = scene.start(*TUNE, "--teacher", scene.teacher, "--output", output)
    [folder] = command.until(lambda: list((output / "runs").glob("tune-*")))
    search = Killed(folder, moments)

    def wait_for(command: Command, number: int, seconds: float) -> None:
        new = len(lines(folder)) + 1
        command.until(lambda: len(lines(folder)) >= max(number, new))
        time.sleep(seconds)

    # the driver alone: what it has started must see that by itself
    wait_for(command, *moments[0])
    command.send(signal.SIGKILL)
    search.seconds["driver"] = command.seconds_until_gone("ray::ResourceTrainable")
    search.look()

    command = scene.start("tune", "--resume", output)
    wait_for(command, *moments[1])
    command.send(signal.SIGINT)
    time.sleep(0.1)
    search.seconds["Ctrl-C twice"] = command.stop(signal.SIGINT)
    search.look()

    command = scene.start("tune", "--resume", output)
    wait_for(command, *moments[2])
    command.kill_all()
    command.wait()
    search.look()

    command = scene.start("tune", "--resume", output, "--json")
    wait_for(command, 0, 0.0)
    # the line may be of a trial's end, and the next one's process not there yet
    command.until(lambda: command.kill("ray::ResourceTrainable.train"))
    search.result = command.result()
    search.warnings = command.err
    return search
