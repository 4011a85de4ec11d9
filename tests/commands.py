"""The command line as a process of its own: what it wrote, and every process that came of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ray  # noqa: F401  (brings psutil along)

import psutil  # type: ignore[import-untyped]  # isort: skip

REPOSITORY = Path(__file__).parents[1]
# generous: other tests use the processors as well
TIMEOUT = 900.0
WATCH_SECONDS = 0.4
# of whoever runs the tests: another cluster, another MLflow server
FOREIGN = (
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_REGISTRY_URI",
)


@contextlib.contextmanager
def commands_in(folder: Callable[[str], Path]) -> Iterator[Callable[..., Command]]:
    """Yield a function that starts a command in a new folder; end them all."""
    started: list[Command] = []

    def start(
        *arguments: str | Path,
        cwd: Path = REPOSITORY,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> Command:
        command = Command(folder("command"), *arguments, cwd=cwd, environment=environment)
        started.append(command)
        return command

    try:
        yield start
    finally:
        for command in started:
            command.end()


class Command:
    """``raygkd`` with some arguments, started, and watched until it is over.

    Args:
        folder: gets what it writes to standard output and standard error.
        arguments: of the command line.
        cwd: its working folder.
        environment: what it has besides this process's.

    Attributes:
        seen: title of a process -> how many had it at some time.
    """

    def __init__(
        self, folder: Path, *arguments: str | Path, cwd: Path, environment: Mapping[str, str]
    ):
        self._out, self._err = folder / "stdout", folder / "stderr"
        self.seen: Counter[str] = Counter()
        self._titles: dict[psutil.Process, set[str]] = {}
        inherited = {name: value for name, value in os.environ.items() if name not in FOREIGN}
        with self._out.open("w") as out, self._err.open("w") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "raygkd", *map(str, arguments)],
                cwd=cwd,
                env={**inherited, "PYTHONPATH": str(REPOSITORY), **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                # a group of its own gets Ctrl-C as one, as from a terminal
                start_new_session=True,
                # tests that run in the background of a shell inherit an ignored Ctrl-C
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )
        self._root = psutil.Process(self._process.pid)
        self._titles[self._root] = set()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        while self._process.poll() is None:
            self._look()
            time.sleep(WATCH_SECONDS)

    def _look(self) -> None:
        """Note the processes there are; Ray gives them titles when it puts them to work."""
        alive: set[psutil.Process] = set()
        # what Ray starts are children of the command for as long as it lives
        for process in [self._root] if self._root.is_running() else self.survivors():
            with contextlib.suppress(psutil.NoSuchProcess):
                alive |= {process, *process.children(recursive=True)}
        now: dict[psutil.Process, str] = {}
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                words = process.cmdline()
                # one that has just ended has none any more; a method at work is part of the title
                if words:
                    now[process] = re.sub(r"^(ray::\w+).*", r"\1", words[0].strip())
        for process, title in now.items():
            self._titles.setdefault(process, set()).add(title)
        self.seen = Counter(title for titles in self._titles.values() for title in titles)

    @property
    def out(self) -> str:
        """What is on standard output."""
        return self._out.read_text()

    @property
    def err(self) -> str:
        """What is on standard error."""
        return self._err.read_text()

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Return the exit code."""
        return self._process.wait(timeout)

    def result(self) -> dict[str, Any]:
        """Return what ``--json`` printed, after a success."""
        code = self.wait()
        assert code == 0, self.err
        assert self.out.count("\n") == 1
        return json.loads(self.out)

    def until(self, condition: Callable[[], Any]) -> Any:
        """Wait for a condition to hold while the command runs; return what it gave."""
        deadline = time.monotonic() + TIMEOUT
        while not (found := condition()):
            assert self._process.poll() is None, f"it ended before:\n{self.err}"
            assert time.monotonic() < deadline, f"it never came to that:\n{self.err}"
            time.sleep(0.02)
        return found

    def send(self, number: signal.Signals) -> None:
        """Send a signal, Ctrl-C to the whole group."""
        if number == signal.SIGINT:
            os.killpg(self._process.pid, number)
        else:
            self._process.send_signal(number)

    def stop(self, number: signal.Signals) -> float:
        """Send a signal; return the seconds until the end."""
        started = time.monotonic()
        self.send(number)
        self.wait(60)
        return time.monotonic() - started

    def seconds_until_gone(self, title: str) -> float:
        """Wait until it and its processes of a title have ended; return the seconds."""
        started = time.monotonic()
        mine = [process for process, titles in self._titles.items() if title in titles]
        self.wait(60)
        psutil.wait_procs(mine, 60)
        return time.monotonic() - started

    def kill(self, title: str) -> int:
        """Kill those of its processes that have a title; return how many."""
        killed = 0
        for process in self._root.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.cmdline() and process.cmdline()[0].startswith(title):
                    process.kill()
                    killed += 1
        return killed

    def kill_all(self) -> None:
        """Kill it and all its processes, as a machine does that stops."""
        for process in [self._root, *self._root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def survivors(self) -> list[psutil.Process]:
        """Return those of its processes that are alive."""
        alive = []
        for process in list(self._titles):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(process)
        return alive

    def gone(self, timeout: float) -> bool:
        """Return whether all its processes end within so many seconds."""
        _, alive = psutil.wait_procs(self.survivors(), timeout)
        return not [process for process in alive if process in self.survivors()]

    def end(self) -> None:
        """End whatever is left of it, process by process."""
        if self._process.poll() is None:
            self._look()
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
        self._look()
        for process in self.survivors():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait(10)
        self._watcher.join()
