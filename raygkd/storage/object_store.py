"""Files and folders in an object store: Amazon S3 and compatible stores, and Google's GCS.

They are accessed through fsspec. Credentials, regions and endpoints are configured as for the
store's own tools (``AWS_ACCESS_KEY_ID``, ``AWS_PROFILE``, ``AWS_ENDPOINT_URL``, ...).
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

# scheme -> the package for the store, and our extra that installs it
_PACKAGES = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs")}
# only characters without a special meaning in URIs and patterns
_URL = re.compile(r"(s3|gs)://[\w.-]+(/[\w.=-]+)*/?", re.ASCII)
_USER_INFO = re.compile(r"://[^/\s]*@")
# limits of a request, which is made up to three times: a missing store is noticed in seconds
_S3_CLIENT = {
    "connect_timeout": 5,
    "read_timeout": 15,
    "retries": {"total_max_attempts": 3, "mode": "standard"},
}
# the client's own timeouts do not apply while it waits for the server to accept a file
_WRITE_SECONDS, _SLOWEST_BYTES_PER_SECOND = 30.0, 250e3


@dataclass(frozen=True, order=True)
class RemotePath:
    """A file or folder in an object store, with some of the methods of ``Path``.

    A folder exists as long as it is not empty. Files are written atomically. Errors are raised as
    StorageError with the name of the file, except that reading a missing file raises
    FileNotFoundError, as with ``Path``.

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
        """The folder that contains it."""
        return RemotePath(self.url.rpartition("/")[0])

    def exists(self) -> bool:
        """Return whether the file exists, or the folder contains a file."""
        with self._as_storage_error("read"):
            return self._store.exists(self.url)

    def is_dir(self) -> bool:
        """Return whether the folder contains a file."""
        return any(True for _ in self.iterdir())

    def iterdir(self) -> Iterator[RemotePath]:
        """Yield the contents of the folder; nothing if it does not exist."""
        with self._as_storage_error("read"):
            try:
                paths = self._store.ls(self.url, detail=False)
            except FileNotFoundError:
                paths = []
        names = {path.rstrip("/").rpartition("/")[2] for path in paths}
        # some tools mark a folder by an empty object with the folder's name
        yield from (self / name for name in sorted(names - {self.name}))

    def modified(self) -> float:
        """Return the time of the file's last change, in seconds since 1970."""
        with self._as_storage_error("read"):
            return self._store.modified(self.url).timestamp()

    def read_bytes(self) -> bytes:
        """Return the content."""
        with self._as_storage_error("read"):
            return self._store.cat_file(self.url)

    def read_text(self) -> str:
        """Return the content as text."""
        return self.read_bytes().decode()

    def write_bytes(self, content: bytes) -> None:
        """Write the file, or replace it."""
        with self._as_storage_error("write"):
            self._store.pipe_file(self.url, content, timeout=_write_seconds(len(content)))

    def upload(self, source: Path) -> None:
        """Upload a file from this machine."""
        with self._as_storage_error("write"):
            seconds = _write_seconds(source.stat().st_size)
            self._store.put_file(str(source), self.url, timeout=seconds)

    def download(self, target: Path) -> None:
        """Download the content to a file on this machine."""
        with self._as_storage_error("read"):
            self._store.get_file(self.url, str(target))

    def unlink(self) -> None:
        """Remove the file."""
        with self._as_storage_error("write"):
            self._store.rm_file(self.url)

    def remove(self) -> None:
        """Remove the folder and its contents, if it exists."""
        with self._as_storage_error("write"), contextlib.suppress(FileNotFoundError):
            self._store.rm(self.url, recursive=True)

    @property
    def _store(self) -> Any:
        return client(self.url.partition("://")[0])

    @contextlib.contextmanager
    def _as_storage_error(self, verb: str) -> Iterator[None]:
        """Convert the exceptions of a store's client, which have no common type."""
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
    """Return the file or folder of a URL, without accessing the store.

    Raises:
        ConfigError: the URL is invalid, or the package for its store is not installed.
    """
    check_no_secret(url)
    if not _URL.fullmatch(url):
        raise ConfigError(
            f"{url}: must be a path, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER, with letters, "
            "digits and . _ - = only"
        )
    package, extra = _PACKAGES[url.partition("://")[0]]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{url}: needs {package}: pip install 'raygkd[{extra}]'")
    return RemotePath(url.rstrip("/"))


def check_no_secret(url: str) -> None:
    """Reject a URL with a user name or password, because URLs are stored with the run.

    Raises:
        ConfigError: the URL contains one; the message does not show it.
    """
    if _USER_INFO.search(url):
        raise ConfigError(
            f"{_shown(url)}: remove the user name and password; set them as for the store's own "
            "tools, for example in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )


@functools.cache
def client(scheme: str) -> Any:
    """Return this process's client for a scheme, an fsspec file system."""
    import fsspec

    # no cache of listings, because other processes write, too
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme == "s3":
        options["config_kwargs"] = dict(_S3_CLIENT)
    store = fsspec.filesystem(scheme, **options)
    if scheme == "s3":
        # the client retries requests itself; retrying again would take minutes
        store.retries = 1
    return store


def _write_seconds(size: int) -> float:
    """Return the timeout for writing ``size`` bytes, in seconds."""
    return _WRITE_SECONDS + size / _SLOWEST_BYTES_PER_SECOND


def _reason(error: Exception) -> str:
    """Return an error as a short line without secrets."""
    if isinstance(error, TimeoutError):
        return "no answer"
    text = " ".join(str(error).split()) or type(error).__name__
    return _shown(text)[:300]


def _shown(text: str) -> str:
    """Return a text with user names and passwords removed from its URLs."""
    return _USER_INFO.sub("://", text)
