"""A command as a process of its own: its output, its seconds, and the most memory that it held."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]

WATCH_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A command that is over.

    Attributes:
        code: its exit code.
        out: what it wrote to standard output.
        seconds: from its start to its end.
        peak_mib: the most memory that it and the processes it started held alone, summed.
    """

    code: int
    out: str
    seconds: float
    peak_mib: int


def watched(*arguments: str, kill_after: float = 0.0) -> Ended:
    """Run ``raygkd`` with some arguments to its end.

    Args:
        arguments: of the command line.
        kill_after: seconds after which it is killed; 0 for not at all.
    """
    started, peak = time.monotonic(), [0]
    process = subprocess.Popen(
        [sys.executable, "-m", "raygkd", *arguments], stdout=subprocess.PIPE, text=True
    )

    def watch() -> None:
        while process.poll() is None:
            peak[0] = max(peak[0], _held(process.pid))
            if kill_after and time.monotonic() - started > kill_after:
                process.kill()
            time.sleep(WATCH_SECONDS)

    watcher = threading.Thread(target=watch)
    watcher.start()
    out = process.communicate()[0]
    watcher.join()
    return Ended(
        code=process.returncode,
        out=out,
        seconds=time.monotonic() - started,
        peak_mib=round(peak[0] / 2**20),
    )


def _held(pid: int) -> int:
    """Return the bytes that a process and those it started hold alone."""
    processes: list[psutil.Process] = []
    # any of them may have ended meanwhile
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    total = 0
    for one in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += one.memory_full_info().uss
    return total
