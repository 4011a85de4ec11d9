"""Files and folders in an object store: Amazon S3 (and what speaks its protocol), Google's GCS.

fsspec's file systems do the work. Credentials, regions and endpoints come from where the store's
own tools look for them (``AWS_ACCESS_KEY_ID``, ``AWS_PROFILE``, ``AWS_ENDPOINT_URL``, ...).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raygkd.errors import ConfigError, StorageError

# scheme -> the package that speaks to the store, and the extra of ours that brings it
_PACKAGES = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs")}
# what neither a URI nor a pattern gives another meaning
_URL = re.compile(r"(s3|gs)://[\w.-]+(/[\w.=-]+)*/?", re.ASCII)
_USER_INFO = re.compile(r"://[^/\s]*@")
# of one request, which is made up to three times: a store that is not there is noticed in seconds
_S3_CLIENT = {
    "connect_timeout": 5,
    "read_timeout": 15,
    "retries": {"total_max_attempts": 3, "mode": "standard"},
}
# no timeout of the client's holds while it waits for a server's leave to send a file
_WRITE_SECONDS, _SLOWEST_BYTES_PER_SECOND = 30.0, 250e3


@dataclass(frozen=True, order=True)
class RemotePath:
    """A file or a folder in an object store, with those methods of a ``Path`` that are needed.

    A folder is there as long as something is in it. A file appears whole or not at all. What goes
    wrong is a StorageError that names the file; but a file to be read that is not there is a
    FileNotFoundError, as with a ``Path``.

    Attributes:
        url: ``s3://BUCKET/KEY`` or ``gs://BUCKET/KEY``, without a slash at the end.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        """The folder that it is in."""
        return RemotePath(self.url.rpartition("/")[0])

    def exists(self) -> bool:
        """Return whether there is such a file, or a file in such a folder."""
        with self._telling("read"):
            return self._store.exists(self.url)

    def is_dir(self) -> bool:
        """Return whether there is a file in such a folder."""
        return any(True for _ in self.iterdir())

    def iterdir(self) -> Iterator[RemotePath]:
        """Yield what is in the folder, nothing if that is not there."""
        with self._telling("read"):
            try:
                found = self._store.ls(self.url, detail=False)
            except FileNotFoundError:
                found = []
        names = {path.rstrip("/").rpartition("/")[2] for path in found}
        # an empty object of the folder's own name stands for the folder with some tools
        yield from (self / name for name in sorted(names - {self.name}))

    def modified(self) -> float:
        """Return when the file was written, in seconds since 1970."""
        with self._telling("read"):
            return self._store.modified(self.url).timestamp()

    def read_bytes(self) -> bytes:
        """Return the content."""
        with self._telling("read"):
            return self._store.cat_file(self.url)

    def read_text(self) -> str:
        """Return the content as text."""
        return self.read_bytes().decode()

    def write_bytes(self, content: bytes) -> None:
        """Write the file, in the place of what was there."""
        with self._telling("write"):
            self._store.pipe_file(self.url, content, timeout=_write_seconds(len(content)))

    def upload(self, source: Path) -> None:
        """Write the file with the content of one on this machine."""
        with self._telling("write"):
            seconds = _write_seconds(source.stat().st_size)
            self._store.put_file(str(source), self.url, timeout=seconds)

    def download(self, target: Path) -> None:
        """Write the content to a file on this machine."""
        with self._telling("read"):
            self._store.get_file(self.url, str(target))

    def unlink(self) -> None:
        """Remove the file."""
        with self._telling("write"):
            self._store.rm_file(self.url)

    def remove(self) -> None:
        """Remove the folder with all that is in it; nothing need be there."""
        with self._telling("write"), contextlib.suppress(FileNotFoundError):
            self._store.rm(self.url, recursive=True)

    @property
    def _store(self) -> Any:
        return client(self.url.partition("://")[0])

    @contextlib.contextmanager
    def _telling(self, verb: str) -> Iterator[None]:
        """Raise what a store's client does, which has no common type, as what this class does."""
        try:
            yield
        except FileNotFoundError as error:
            if verb == "read":
                raise FileNotFoundError(
                    errno.ENOENT, os.strerror(errno.ENOENT), self.url
                ) from error
            raise StorageError(f"cannot write {self}: {_reason(error)}") from error
        except Exception as error:
            raise StorageError(f"cannot {verb} {self}: {_reason(error)}") from error


def remote_path(url: str) -> RemotePath:
    """Return the file or folder of a URL; the store is not asked.

    Raises:
        ConfigError: a URL of another form, or the package for its store is not installed.
    """
    check_no_secret(url)
    if not _URL.fullmatch(url):
        raise ConfigError(
            f"{url}: must be a path, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER, of letters, digits "
            "and any of . _ - ="
        )
    package, extra = _PACKAGES[url.partition("://")[0]]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{url}: needs {package}: pip install 'raygkd[{extra}]'")
    return RemotePath(url.rstrip("/"))


def check_no_secret(url: str) -> None:
    """Refuse a URL that holds a user name or password: it is stored with what is run.

    Raises:
        ConfigError: it does; the message does not show them.
    """
    if _USER_INFO.search(url):
        raise ConfigError(
            f"{_shown(url)}: leave out user name and password, and set them where the store's own "
            "tools read them, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )


@functools.cache
def client(scheme: str) -> Any:
    """Return this process's client of the stores of a scheme, an fsspec file system."""
    import fsspec

    # other processes write, so what was listed once is not what is there
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme == "s3":
        options["config_kwargs"] = dict(_S3_CLIENT)
    store = fsspec.filesystem(scheme, **options)
    if scheme == "s3":
        # the client repeats requests itself; to repeat that too would take minutes
        store.retries = 1
    return store


def _write_seconds(size: int) -> float:
    """Return how long the write of so many bytes may take."""
    return _WRITE_SECONDS + size / _SLOWEST_BYTES_PER_SECOND


def _reason(error: Exception) -> str:
    """Return an error as a short line without secrets."""
    if isinstance(error, TimeoutError):
        return "no answer"
    text = " ".join(str(error).split()) or type(error).__name__
    return _shown(text)[:300]


def _shown(text: str) -> str:
    """Return a text whose URLs have no user names and passwords."""
    return _USER_INFO.sub("://", text)
