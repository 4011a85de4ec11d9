"""Files of pretrained weights: from the library's cache, or fetched into it."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch

from raygkd.errors import DataError

# to find out that there is no network
SECONDS = 10.0
T = TypeVar("T")


# what else can be done where weights cannot be fetched
OTHERWISE = ", pass a weights FILE, or 'none' for random weights"


def hub_file(repository: str, names: Sequence[str], what: str, otherwise: str = OTHERWISE) -> Path:
    """Return the first file of these names in a repository of the Hugging Face Hub.

    Args:
        repository: ORG/NAME, or ORG/NAME@REVISION.
        names: of the files, best first.
        what: is fetched, for errors.
        otherwise: what else can be done, for errors.

    Raises:
        DataError: it is not in the cache and cannot be fetched, or there is no such file.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    repo, _, revision = repository.partition("@")
    for name in names:
        cached = try_to_load_from_cache(repo, name, revision=revision or None)
        if isinstance(cached, str):
            return Path(cached)
    cache = Path(constants.HF_HUB_CACHE)

    def fetch() -> Path:
        for name in names:
            try:
                return Path(hf_hub_download(repo, name, revision=revision or None))
            except EntryNotFoundError:
                continue
        raise DataError(f"{what}: {repo} on the Hugging Face Hub has no {' or '.join(names)}")

    return _fetched(fetch, f"{constants.ENDPOINT}/{repo}", what, cache, otherwise)


def url_file(url: str, what: str) -> Path:
    """Return the file at a URL, in torch's folder of downloads.

    Raises:
        DataError: it is not there and cannot be fetched.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if path.exists():
        return path

    def fetch() -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        # the file's name ends with the beginning of its digest
        digest = torch.hub.HASH_REGEX.search(path.name)
        torch.hub.download_url_to_file(url, str(path), digest and digest[1], progress=False)
        return path

    return _fetched(fetch, url, what, path.parent, OTHERWISE)


def _fetched(fetch: Callable[[], T], url: str, what: str, cache: Path, otherwise: str) -> T:
    try:
        _require_reachable(url)
        return fetch()
    except DataError:
        raise
    except Exception as error:  # the libraries' errors of networks have no common type
        reason = _reason(error)
        raise DataError(
            f"{what} cannot be downloaded from {urlsplit(url).netloc} ({reason}); download it on "
            f"another machine and copy it into the cache {cache}{otherwise}"
        ) from error


def _require_reachable(url: str) -> None:
    """Raise OSError within ``SECONDS`` where a server cannot be reached; libraries try for longer.

    Any answer of the server will do, and proxies are respected.
    """
    parts = urlsplit(url)
    request = urllib.request.Request(f"{parts.scheme}://{parts.netloc}", method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=SECONDS).close()
    except urllib.error.HTTPError as error:
        error.close()


def _reason(error: BaseException) -> str:
    reason: Any = getattr(error, "reason", None) or error
    return " ".join(str(reason).split())[:160] or type(error).__name__
