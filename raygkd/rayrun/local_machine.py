"""What a cluster of this machine needs of it: limits, a folder with short paths, live processes."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raygkd.errors import ClusterLost, ResourceError
from raygkd.storage.temporary import temporary_folder

# open files of one process of Ray, and those that are asked for
FEWEST_FILES, WANTED_FILES = 1024, 65536
# processes and threads of a user
FEWEST_PROCESSES = 512
# bytes of a socket's path, and those of it below the folder of Ray's sessions
SOCKET_BYTES, SESSION_BYTES = (
    107,
    len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"),
)
# of a temporary folder's name
NAME_BYTES = len("/raygkd-tmp-ray-00000000")
SHORT = Path("/tmp")
# processes without which a cluster is lost, and seconds between looks at them
NEEDED = ("raylet", "gcs_server")
WATCH_SECONDS = 0.5
# that the main thread has to close everything after a loss
GRACE_SECONDS = 8.0


def check_limits() -> None:
    """Raise the limit of open files as far as it may be; the child processes inherit it.

    Raises:
        ResourceError: a limit of this machine is too low for Ray.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(WANTED_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if hard != resource.RLIM_INFINITY and hard < FEWEST_FILES:
        raise ResourceError(
            f"a process may open only {hard} files at a time, and Ray needs {FEWEST_FILES}; raise "
            f"the limit with 'ulimit -n {FEWEST_FILES}', or in the settings of the container or "
            "batch system"
        )
    _, most = resource.getrlimit(resource.RLIMIT_NPROC)
    # it does not apply to root
    if os.getuid() and most != resource.RLIM_INFINITY and most < FEWEST_PROCESSES:
        raise ResourceError(
            f"a user may have only {most} processes and threads, and Ray needs {FEWEST_PROCESSES}; "
            f"raise the limit with 'ulimit -u {FEWEST_PROCESSES}', or in the settings of the "
            "container or batch system"
        )


def session_parent() -> Path:
    """Return where the folder of Ray's sessions is made.

    It is RAY_TMPDIR, TMPDIR or, if that is too long for the path of a socket, /tmp.

    Raises:
        ResourceError: it cannot be written.
    """
    parent = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    if len(os.fsencode(parent)) + NAME_BYTES + SESSION_BYTES > SOCKET_BYTES:
        parent = SHORT
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ResourceError(
            f"Ray's sockets need a folder with a short path, and {parent} cannot be written; set "
            f"RAY_TMPDIR to a folder of at most {SOCKET_BYTES - NAME_BYTES - SESSION_BYTES} "
            "characters"
        )
    return parent


@contextlib.contextmanager
def session_folder() -> Iterator[Path]:
    """Yield a folder for Ray's sessions and its processes' temporary files, removed at the end."""
    with temporary_folder("ray", parent=session_parent()) as folder:
        yield folder


@contextlib.contextmanager
def temporary_files_in(folder: Path) -> Iterator[None]:
    """Let processes that are started in the block have their temporary files in a folder."""
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before


class ClusterWatch:
    """Ends the work of this process if one of the cluster's processes ends.

    The main thread gets a KeyboardInterrupt, so that everything open is closed as after Ctrl-C.
    Ray may end the process before that, without a word, so the reason is printed first.
    """

    def __init__(self) -> None:
        import psutil

        names = {child: child.name() for child in psutil.Process().children()}
        self._needed = {child: name for child, name in names.items() if name in NEEDED}
        self._is_over = threading.Event()
        self.lost: ClusterLost | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch inside the block.

        Raises:
            ClusterLost: a process of the cluster has ended.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGUSR1, self._interrupt)
        thread = threading.Thread(target=self._watch, name="watches-cluster", daemon=True)
        thread.start()
        try:
            yield
        except BaseException as error:
            if self.lost is None:
                raise
            raise self.lost from error
        finally:
            self._is_over.set()
            thread.join()
            signal.signal(signal.SIGUSR1, before)

    def _interrupt(self, number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    def _watch(self) -> None:
        # Linux alone tells of a process's end at once
        if not hasattr(os, "pidfd_open"):
            return
        with contextlib.ExitStack() as stack:
            ends = select.poll()
            for process in self._needed:
                file = os.pidfd_open(process.pid)
                stack.callback(os.close, file)
                ends.register(file, select.POLLIN)
            while not self._is_over.is_set():
                if ends.poll(1000 * WATCH_SECONDS) and not self._is_over.is_set():
                    self._tell()
                    return

    def _tell(self) -> None:
        pid, name = next(
            (process.pid, name) for process, name in self._needed.items() if not _is_alive(process)
        )
        hint = f"; resume with: {_open_work[-1][0]}" if _open_work else ""
        self.lost = ClusterLost(
            f"Ray's process {name} ({pid}) ended unexpectedly, perhaps {_cause(pid)}{hint}"
        )
        # Ray may have put its threads' output in the middle of a line
        line = f"\nerror: {self.lost}\n".encode()
        os.write(2, line)
        os.kill(os.getpid(), signal.SIGUSR1)
        # the main thread may be waiting inside Ray, which would end the process after a minute
        if not self._is_over.wait(GRACE_SECONDS):
            for _, close in reversed(_open_work):
                close()
            self.end_all()
            os.write(2, line)
            os._exit(1)

    def end_all(self) -> None:
        """End the processes of a lost cluster, which would wait for each other."""
        for process in self._needed:
            if _is_alive(process):
                process.kill()


# the command that resumes it, and what closes it
_open_work: list[tuple[str, Callable[[], None]]] = []


@contextlib.contextmanager
def open_work(command: str, close: Callable[[], None]) -> Iterator[None]:
    """Name what is to be done about the work of the block, should the cluster be lost.

    Args:
        command: that resumes it.
        close: closes it, from another thread.
    """
    _open_work.append((command, close))
    try:
        yield
    finally:
        _open_work.pop()


def _cause(pid: int) -> str:
    """Return what may have ended a child process, whose exit status stays for its parent."""
    try:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        ended = None
    if ended is None or (ended.si_code, ended.si_status) == (os.CLD_KILLED, signal.SIGKILL):
        return "killed for lack of memory"
    # as 'timeout' and batch systems send it
    return "by a signal to all processes of this command"


def _is_alive(process: Any) -> bool:
    import psutil

    try:
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
