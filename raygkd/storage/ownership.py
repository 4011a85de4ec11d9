"""One owner of a folder: a lock that ends with the process that holds it, on every node.

The owner's record is a file in the folder. Two things keep others out:

- ``flock`` on that file. The kernel releases it with the process, however it ends, so the next
  process need not wait. On NFS, Linux makes it a lock of the server, which the other nodes see.
- The file's time, which the owner renews every few seconds. It decides where there are no locks
  (object stores, Lustre without ``-o flock``) or where they end at the node (NFS with ``nolock``):
  the owner on another node is dead once its record is old. Ages are differences of two times of the
  same store, so that clocks need not agree.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import platform
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from raygkd.errors import ResourceError, StorageError
from raygkd.storage.atomic_files import (
    Place,
    make_folder,
    modified,
    storage_errors,
    write_text,
)
from raygkd.storage.object_store import RemotePath

RECORD = ".owner"
BEAT_SECONDS, DEAD_SECONDS = 10.0, 60.0
# after which a record that was written at the same time in an object store would be seen
SETTLE_SECONDS = 1.0
POLL_SECONDS = 0.5
# a file system without locks
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A process that owns a folder.

    Attributes:
        command: that it runs.
        process: its id.
        machine: name of its machine.
        since: when it became the owner, in local time.
        boot: id of the machine's start, and of the process ids' name space.
        started: when the process was started, in the kernel's ticks; 0 if unknown.
        token: of this ownership.
    """

    command: str
    process: int
    machine: str
    since: str
    boot: tuple[str, str]
    started: int
    token: str

    def __str__(self) -> str:
        return f"since {self.since}, by process {self.process} on {self.machine} ({self.command})"


class Owned(ResourceError):
    """Another process owns the folder."""

    def __init__(self, folder: Place, owner: Owner | None):
        told = owner or "by another process"
        super().__init__(
            f"{folder}: is under way {told}; wait for it, stop it, or choose another --name"
        )
        self.owner = owner


@contextlib.contextmanager
def owned(folder: Place) -> Iterator[None]:
    """Own a folder inside the block; it is created if missing, and removed again if left empty.

    Raises:
        Owned: another process owns it.
        StorageError: it cannot be written.
    """
    made = [one for one in (folder, folder.parent) if isinstance(one, Path) and not one.exists()]
    make_folder(folder)
    owner = _this_process()
    file = _taken(folder, owner)
    is_over = threading.Event()
    beat = threading.Thread(
        target=_renew, args=(folder, owner, is_over), name="owner-beat", daemon=True
    )
    beat.start()
    try:
        yield
    finally:
        is_over.set()
        beat.join()
        _release(folder, owner, file)
        # nothing was begun
        with contextlib.suppress(OSError):
            for one in made:
                one.rmdir()


@contextlib.contextmanager
def owned_in_turn(folder: Place, tell: Callable[[str], None]) -> Iterator[None]:
    """Own a folder inside the block, after waiting for a process that owns it.

    Args:
        folder: see ``owned``.
        tell: shows a line if there is a wait.
    """
    with contextlib.ExitStack() as stack:
        is_told = False
        while True:
            try:
                stack.enter_context(owned(folder))
                break
            except Owned as error:
                if not is_told:
                    tell(f"waiting for {folder}, which is under way {error.owner or ''}".rstrip())
                    is_told = True
                time.sleep(POLL_SECONDS)
        yield


def is_abandoned(folder: Place) -> bool:
    """Return whether the process that owned a folder ended without releasing it."""
    record = folder / RECORD
    if not record.exists():
        return False
    if isinstance(folder, RemotePath):
        return _age(folder) > DEAD_SECONDS
    try:
        file, has_locks = _locked(folder)
    except Owned:
        return False
    try:
        return not _may_live(folder, _read(folder), has_locks)
    finally:
        os.close(file)


def _taken(folder: Place, owner: Owner) -> int | None:
    """Make a process the owner; return the locked file, or None in an object store."""
    if isinstance(folder, RemotePath):
        _wait_for_the_dead(folder, has_locks=False)
        _write(folder, owner)
        time.sleep(SETTLE_SECONDS)
        if (other := _read(folder)) is not None and other.token != owner.token:
            raise Owned(folder, other)
        return None
    file, has_locks = _locked(folder)
    try:
        _wait_for_the_dead(folder, has_locks=has_locks)
        # not renamed into place: the lock is on this file
        text = json.dumps(asdict(owner)).encode()
        os.ftruncate(file, 0)
        os.pwrite(file, text, 0)
        os.fsync(file)
    except BaseException:
        os.close(file)
        raise
    return file


def _locked(folder: Path) -> tuple[int, bool]:
    """Return the open record with the lock on it, and whether the file system has locks.

    Raises:
        Owned: another process has the lock.
    """
    path = folder / RECORD
    deadline = time.monotonic() + POLL_SECONDS
    while True:
        with storage_errors(path):
            # an owner that has begun nothing removes the folder
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                # Lustre and NFS lock files that are open for writing
                file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:
                continue
        has_locks = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            owner = _read(folder)
            # a process that looks at what a dead one left has the lock for an instant
            if not _is_dead_here(owner) or time.monotonic() > deadline:
                raise Owned(folder, owner) from None
            time.sleep(0.02)
            continue
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(file)
                raise StorageError(f"cannot write {path}: {error.strerror}") from error
            has_locks = False
        # an owner removes its record while it still has the lock
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                return file, has_locks
        os.close(file)


def _wait_for_the_dead(folder: Place, *, has_locks: bool) -> None:
    """Return once the owner of record is known to be dead.

    Raises:
        Owned: it lives.
    """
    record = folder / RECORD
    if not record.exists():
        return
    owner, renewed = _read(folder), modified(record)
    while _may_live(folder, owner, has_locks):
        time.sleep(POLL_SECONDS)
        if not record.exists():
            return
        is_here = owner is not None and owner.boot == _boot()
        if is_here or modified(record) != renewed:
            raise Owned(folder, owner)


def _may_live(folder: Place, owner: Owner | None, has_locks: bool) -> bool:
    """Return whether the owner of record may live, given that its lock is free or there is none."""
    if owner is None:
        # written in the moment before a kill, or never
        return False
    if owner.boot[0] == _boot()[0]:
        if has_locks:
            return False
        if owner.boot == _boot():
            return not _is_dead_here(owner)
    return _age(folder) <= DEAD_SECONDS


def _is_dead_here(owner: Owner | None) -> bool:
    """Return whether the owner of record has ended on this machine, or has written none yet."""
    if owner is None:
        return True
    return owner.boot == _boot() and owner.started != _started(owner.process)


def _age(folder: Place) -> float:
    """Return the seconds since the record was renewed, by the clock of its store."""
    probe = folder / f".now-{secrets.token_hex(4)}"
    write_text(probe, "")
    try:
        return modified(probe) - modified(folder / RECORD)
    finally:
        probe.unlink()


def _renew(folder: Place, owner: Owner, is_over: threading.Event) -> None:
    while not is_over.wait(BEAT_SECONDS):
        # what cannot be written now is noticed by the run itself
        with contextlib.suppress(OSError, StorageError):
            if isinstance(folder, Path):
                os.utime(folder / RECORD)
            elif (other := _read(folder)) is not None and other.token == owner.token:
                _write(folder, owner)


def _release(folder: Place, owner: Owner, file: int | None) -> None:
    # the folder may be gone, or its disk
    with contextlib.suppress(OSError, StorageError):
        if isinstance(folder, RemotePath):
            if (other := _read(folder)) is not None and other.token == owner.token:
                (folder / RECORD).unlink()
        elif file is not None and os.path.samestat(os.fstat(file), (folder / RECORD).stat()):
            (folder / RECORD).unlink()
    if file is not None:
        os.close(file)


def _write(folder: RemotePath, owner: Owner) -> None:
    write_text(folder / RECORD, json.dumps(asdict(owner)))


def _read(folder: Place) -> Owner | None:
    """Return the owner of record; None if there is none, or its record is being written."""
    try:
        known = json.loads((folder / RECORD).read_text())
        return Owner(**{**known, "boot": tuple(known["boot"])})
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def _this_process() -> Owner:
    return Owner(
        command=_command(),
        process=os.getpid(),
        machine=platform.node(),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        boot=_boot(),
        started=_started(os.getpid()),
        token=secrets.token_hex(8),
    )


def _command() -> str:
    """Return what this process runs, without its options."""
    script = os.path.basename(sys.argv[0]) if sys.argv else ""
    if script in ("", "-c"):
        return "python"
    # python -m raygkd
    words = ["raygkd" if script == "__main__.py" else script, *sys.argv[1:2]]
    return " ".join(words)


@functools.cache
def _boot() -> tuple[str, str]:
    """Return what tells this start of this machine, and its process ids, from all others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return boot, os.readlink("/proc/self/ns/pid")
    except OSError:
        return platform.node(), ""


def _started(process: int) -> int:
    """Return when a process was started, in ticks since the boot; 0 if there is no such process."""
    try:
        # the name before the bracket may have spaces
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return int(fields[19])
    except (OSError, IndexError, ValueError):
        return 0
