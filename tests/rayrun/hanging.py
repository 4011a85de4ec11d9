"""Searches whose MLflow server hangs: for a while, and until the search is over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import Command
from scenes import Scene
from servers import Server

TRIALS = 3
TUNE = (
    *("tune", "--dataset", "digits", "--limit-train", "256", "--student", "resnet8"),
    *("--method", "none", "--seed", "3", "--trials", TRIALS, "--scheduler", "none"),
    *("--max-concurrent", "1", "--json"),
)
SHORT, LONG = 5, 40
# seconds; a request that is not answered takes this long, and ten where nothing is said
WAITING = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "2"}
Tune = Callable[[int], tuple[Command, Path]]


@dataclass(frozen=True)
class Hung:
    """A search whose server hung for a while.

    Attributes:
        over: trials that were over when it answered again.
    """

    command: Command
    folder: Path
    over: int
    result: dict[str, Any]


@dataclass(frozen=True)
class Silent:
    """A search whose server hung until it was over, and its folder given to ``--resume`` later.

    Attributes:
        first, second: what the two commands printed.
        before, after: the run's files of training -> when they were written last.
    """

    command: Command
    folder: Path
    first: dict[str, Any]
    second: dict[str, Any]
    before: dict[Path, int]
    after: dict[Path, int]


def hang(scene: Scene) -> tuple[Server, Hung, Silent]:
    """Let a server hang in a search as soon as its first epoch is in the journal, and in another.

    In the first it answers again after a trial and a warning, in the other when it is over; the
    folder of the other is then given to ``--resume``.
    """
    server = Server(scene.folder("server"))
    scene.stack.callback(server.kill)
    server.start()
    server.wait()
    output = scene.folder("hanging")

    def tune(epochs: int) -> tuple[Command, Path]:
        before = set(output.glob("runs/tune-*"))
        command = scene.start(
            *(*TUNE, "--epochs", epochs, "--teacher", scene.teacher, "--output", output),
            *("--tracking-uri", server.uri),
            environment=WAITING,
        )

        def one_epoch() -> list[Path]:
            found = set(output.glob("runs/tune-*/trials.jsonl"))
            journals = [path for path in found if path.parent not in before]
            return [path.parent for path in journals if '"metrics"' in path.read_text()]

        [folder] = command.until(one_epoch)
        server.pause()
        return command, folder

    return server, _hung(tune, server), _silent(tune, server, scene)


def _hung(tune: Tune, server: Server) -> Hung:
    command, folder = tune(LONG)
    shown = f"trials (1 at a time): 1/{TRIALS}"
    try:
        command.until(lambda: outages(command) and shown in command.err)
        over = command.err.count("trials (1 at a time): ") - 1
    finally:
        server.go_on()
    return Hung(command, folder, over, command.result())


def _silent(tune: Tune, server: Server, scene: Scene) -> Silent:
    command, folder = tune(SHORT)
    try:
        first = command.result()
    finally:
        server.go_on()
    before = trained(folder)
    second = scene.start("tune", "--resume", folder, "--json", environment=WAITING).result()
    return Silent(command, folder, first, second, before, trained(folder))


def outages(command: Command) -> list[str]:
    """Return the warnings that the server does not answer."""
    return [line for line in command.err.splitlines() if "does not answer" in line]


def trained(folder: Path) -> dict[Path, int]:
    """Return what training writes -> when it was written last."""
    paths = [folder / "trials.jsonl", *folder.rglob("checkpoint.pt")]
    return {path: path.stat().st_mtime_ns for path in paths}
