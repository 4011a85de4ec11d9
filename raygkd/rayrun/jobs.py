"""Submit commands to a cluster as Ray jobs; follow, list and stop them."""

from __future__ import annotations

import asyncio
import datetime
import logging
import os
import secrets
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

import raygkd
from raygkd.errors import ResourceError, RunFailed

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
# what a job is sent with lies in the head's memory, and goes to every node
LIMIT = 10 << 20
_LEFT_OUT = ("__pycache__",)
# what a job has, once it is asked to stop, to finish its step, write a checkpoint and close its
# MLflow runs; Ray gives it 3 where it is not told
STOP_SECONDS = 20


def connect(address: str | None) -> JobSubmissionClient:
    """Return a client of a cluster's job server.

    Args:
        address: of the dashboard ("http://host:8265"); None for ``RAY_API_SERVER_ADDRESS``, or this
            machine. The token is Ray's: ``RAY_AUTH_TOKEN``, ``RAY_AUTH_TOKEN_PATH`` or
            ``~/.ray/auth_token``, with ``RAY_AUTH_MODE=token``.

    Raises:
        ResourceError: the cluster does not answer, or the token is missing or wrong.
    """
    # that it uploads, and that a connection closes
    for name in ("", ".dashboard.modules.dashboard_sdk", ".dashboard.modules.job.sdk"):
        logging.getLogger(f"ray{name}").setLevel(logging.WARNING)
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    try:
        client = JobSubmissionClient(address)
        version = client._server_ray_version
    except AuthenticationError as error:
        raise ResourceError(
            f"the cluster at {address} rejects this machine's token; set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH to the file with the cluster's token"
        ) from error
    except (OSError, RuntimeError, ValueError, requests.RequestException) as error:
        reason = " ".join(str(error).split())[:200]
        raise ResourceError(
            f"no Ray dashboard answers at {address} ({reason}); pass that of the head node with "
            "--address, such as http://HOST:8265"
        ) from error
    if version.split(".")[:2] != ray.__version__.split(".")[:2]:
        raise ResourceError(
            f"the cluster at {address} runs Ray {version} and this machine {ray.__version__}; "
            f"install 'ray[default,train,tune]=={version}' here"
        )
    return client


def package(arguments: Sequence[str], files: Sequence[str], folder: Path) -> list[str]:
    """Copy the files that a command names to the upload folder; return the changed arguments.

    Args:
        arguments: of ``raygkd``.
        files: local files among them or their values.
        folder: empty folder to upload.

    Raises:
        ResourceError: the upload is too large.
    """
    names = {}
    for number, path in enumerate(dict.fromkeys(files)):
        names[path] = f"{number}-{Path(path).name}"
        shutil.copy(path, folder / names[path])
    size = _size(folder) + _size(Path(raygkd.__file__).parent)
    if size > LIMIT:
        largest = max(names, key=lambda path: Path(path).stat().st_size)
        raise ResourceError(
            f"{largest}: a job can upload at most {LIMIT >> 20} MiB and this one has "
            f"{size / 2**20:.1f}; put the file on storage that all nodes share and pass its path "
            "there"
        )
    renamed = []
    for argument in arguments:
        option, _, value = argument.partition("=")
        if _renamed(value, names) != value:
            argument = f"{option}={_renamed(value, names)}"
        renamed.append(_renamed(argument, names))
    return renamed


def _renamed(argument: str, names: Mapping[str, str]) -> str:
    """Return a path's new name, also in FILE.py:FUNCTION and in lists with commas."""
    if argument in names:
        return names[argument]
    renamed = []
    for part in argument.split(","):
        path, colon, function = part.rpartition(":")
        is_function = colon and path in names
        renamed.append(f"{names[path]}:{function}" if is_function else names.get(part, part))
    return ",".join(renamed)


def _size(folder: Path) -> int:
    files = (path for path in folder.rglob("*") if not set(_LEFT_OUT) & set(path.parts))
    return sum(path.stat().st_size for path in files if path.is_file())


def submit(client: JobSubmissionClient, arguments: Sequence[str], folder: Path) -> str:
    """Submit a command with a folder as its working directory; return the job's id.

    The package is uploaded too, so that the cluster runs this version of it.

    Raises:
        ResourceError: the cluster does not accept it.
    """
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    try:
        return client.submit_job(
            entrypoint=shlex.join(["python", "-m", "raygkd", *arguments]),
            submission_id=f"raygkd-{arguments[0]}-{stamp}-{secrets.token_hex(2)}",
            runtime_env={
                "working_dir": str(folder),
                "py_modules": [str(Path(raygkd.__file__).parent)],
                "excludes": list(_LEFT_OUT),
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
            },
        )
    except (RuntimeError, requests.RequestException) as error:
        # a head that has just started has nobody yet who takes jobs
        reason = str(error).strip().splitlines()[-1][:200]
        raise ResourceError(
            f"the cluster at {client.get_address()} does not accept the job ({reason}); try again "
            "in a minute, and look at 'ray status' there"
        ) from error


def follow(client: JobSubmissionClient, job: str, write: Callable[[str], Any]) -> int:
    """Print the output of a job until it ends; return its exit code, 130 if it was stopped.

    Lost connections are re-established.

    Raises:
        RunFailed: the job could not be run, or its cluster no longer answers.
    """
    written = 0
    while not (status := _status(client, job)).is_terminal():
        written += asyncio.run(_tail(client, job, written, write))
    write(client.get_job_logs(job)[written:])
    if status == JobStatus.SUCCEEDED:
        return 0
    if status == JobStatus.STOPPED:
        return 130
    details = client.get_job_info(job)
    if details.driver_exit_code is None:
        raise RunFailed(f"job {job} failed: {' '.join((details.message or '').split())[:300]}")
    return int(details.driver_exit_code)


def _status(client: JobSubmissionClient, job: str) -> JobStatus:
    try:
        return client.get_job_status(job)
    except (RuntimeError, requests.RequestException) as error:
        raise RunFailed(
            f"the cluster of job {job} no longer answers; the job may still be running: "
            f"raygkd jobs logs {job}"
        ) from error


async def _tail(
    client: JobSubmissionClient, job: str, written: int, write: Callable[[str], Any]
) -> int:
    """Print a log from a given character on while the connection lasts; return the count."""
    seen = 0
    try:
        async for text in client.tail_job_logs(job):
            new = text[max(0, written - seen) :]
            seen += len(text)
            if new:
                write(new)
    except (aiohttp.ClientError, RuntimeError):
        # its status is asked next, which tells whether anybody is there
        await asyncio.sleep(1.0)
    return max(0, seen - written)


def known(client: JobSubmissionClient, job: str) -> JobDetails:
    """Return the details of a job.

    Raises:
        ResourceError: there is no such job.
    """
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        ids = [details.submission_id for details in jobs(client)][:5]
        raise ResourceError(
            f"no job {job}; the latest are: {', '.join(filter(None, ids)) or 'none'}"
        ) from error


def jobs(client: JobSubmissionClient) -> list[JobDetails]:
    """Return the submitted jobs, latest first."""
    found = [details for details in client.list_jobs() if details.submission_id]
    return sorted(found, key=lambda details: details.start_time or 0, reverse=True)
