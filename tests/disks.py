"""A small disk that fills up and becomes read-only."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest


class Disk:
    """A tmpfs over a folder.

    Args:
        folder: that it is mounted over.
        megabytes: of room.
    """

    def __init__(self, folder: Path, megabytes: int):
        self.folder = folder
        self._filling = folder / "filling"
        options = ("-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs")
        done = subprocess.run(["mount", *options, folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
        self._mounts = 1

    def fill(self) -> None:
        """Take all the room that is left, in the largest pieces that fit."""
        with self._filling.open("ab", buffering=0) as file:
            for size in (1 << 20, 1):
                with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                    _write_on(file, size)

    def make_room(self) -> None:
        """Give the room back."""
        self._filling.unlink()

    def protect(self) -> None:
        """Let nothing be opened for writing any more; what is open may still be written.

        A disk with files that are open for writing cannot be mounted read-only, so the same disk is
        mounted once more, over itself; elsewhere first, where nobody opens a file.
        """
        aside = self.folder.with_name(f"{self.folder.name}-protected")
        aside.mkdir(exist_ok=True)
        subprocess.run(["mount", "--bind", self.folder, aside], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,ro,bind", aside], check=True)
            subprocess.run(["mount", "--bind", aside, self.folder], check=True)
            self._mounts += 1
        finally:
            subprocess.run(["umount", aside], check=True)

    def allow(self) -> None:
        """Take ``protect`` back."""
        self._unmount()

    def end(self) -> None:
        """Unmount it, also while something has files open in it."""
        while self._mounts:
            self._unmount()

    def _unmount(self) -> None:
        if subprocess.run(["umount", self.folder], capture_output=True).returncode:
            subprocess.run(["umount", "--lazy", self.folder], check=True)
        self._mounts -= 1


def _write_on(file: Any, size: int) -> None:
    while True:
        file.write(bytes(size))
