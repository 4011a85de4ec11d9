"""The MLflow store: find it, check it, and create it."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import shutil
import sqlite3
import threading
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from raygkd.errors import ConfigError, StorageError, TrackingError, brief
from raygkd.storage.atomic_files import Place, is_remote, place, whole_file
from raygkd.tracking.client import client_of, silence_mlflow
from raygkd.tracking.moved_store import ARTIFACTS, STORE, move_places_along
from raygkd.tracking.redaction import short_reason, shown

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

# where artifacts are that clients send to their server and ask it for
SERVED = "mlflow-artifacts:/"
# what SQLAlchemy uses for a database unless its URI names another
_DRIVERS = {"postgresql": "psycopg2", "mysql": "MySQLdb", "mssql": "pyodbc"}
_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")


def chosen_uri(given: str | None, output: str) -> str:
    """Return the URI of the store: the given one, the environment's, or that of the output folder.

    Args:
        given: ``--tracking-uri``.
        output: ``--output``.

    Raises:
        ConfigError: a URL of an output folder that cannot be used.
        TrackingError: the output folder is in an object store, which cannot hold an MLflow store,
            or the URI is none of a store.
    """
    uri = given or os.environ.get("MLFLOW_TRACKING_URI")
    if is_remote(output):
        try:
            place(output)
        except ConfigError as error:
            raise ConfigError(f"--output {error}") from error
    if is_remote(output) and (uri is None or uri.startswith("sqlite")):
        raise TrackingError(
            f"--output {shown(output)}: needs --tracking-uri http://HOST:PORT of an MLflow server, "
            "since MLflow's own store is a file; start one with 'raygkd ui --host'"
        )
    if uri is None:
        uri = default_uri(place(output))
        # they have a meaning in the URI of a store
        if any(character in uri for character in "?#%"):
            raise TrackingError(
                f"--output {brief(output, quoted=False)}: contains ?, # or %, which MLflow's store "
                "cannot have in its path; choose another folder"
            )
    scheme, separator, _ = uri.partition("://")
    if not separator or scheme.partition("+")[0] not in _SCHEMES:
        raise TrackingError(
            f"{source_of(uri)} {shown(uri)}: must be sqlite:///FILE or http(s)://HOST:PORT (MLflow "
            "no longer has file stores)"
        )
    if scheme in ("http", "https") and not _names_host(uri):
        raise TrackingError(
            f"{source_of(uri)} {brief(uri)}: names no server; write {scheme}://HOST:PORT"
        )
    driver = _DRIVERS.get(scheme.partition("+")[0])
    if driver is not None and "+" not in scheme and importlib.util.find_spec(driver) is None:
        raise TrackingError(
            f"{source_of(uri)} {shown(uri)}: needs the package {driver}; install it, or pass the "
            "URL of an MLflow server"
        )
    return uri


def _names_host(uri: str) -> bool:
    """Return whether a URL has a host, and a port that there can be."""
    try:
        parts = urlsplit(uri)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def source_of(uri: str) -> str:
    """Return where the URI of a store came from: the option, or the environment's variable."""
    return (
        "MLFLOW_TRACKING_URI" if os.environ.get("MLFLOW_TRACKING_URI") == uri else "--tracking-uri"
    )


def is_file(uri: str) -> bool:
    """Return whether a store is a file."""
    return uri.partition("://")[0].partition("+")[0] == "sqlite"


def default_uri(output: Place) -> str:
    """Return the SQLite store inside a local output folder."""
    return f"sqlite:///{place(output / STORE)}"


def connect(uri: str, experiment: str, output: Place) -> str:
    """Return the id of the experiment; create the experiment and the store if they are missing.

    Args:
        uri: of the store or server.
        experiment: its name.
        output: folder for the artifacts of a local store, local in that case.

    Raises:
        TrackingError: the server does not answer, the store cannot be used, or the experiment's
            artifacts cannot be written from this machine.
    """
    local = is_file(uri)
    try:
        if local:
            assert isinstance(output, Path)
            artifacts = (output / ARTIFACTS).resolve().as_uri()
            make_store(_path_of(uri), artifacts)
            move_places_along(_path_of(uri))
        found = _experiment(uri, experiment, artifacts if local else None)
    except TrackingError:
        raise
    except Exception as error:
        # what requests raises is an OSError, and MLflow wraps it
        silent = isinstance(error.__context__, OSError)
        reason = "no answer" if silent else short_reason(error, uri)
        raise TrackingError(
            f"MLflow at {shown(uri)} cannot be used: {reason}; start it, or {_without(uri)}"
        ) from error
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"--experiment {experiment}: was deleted in {shown(uri)}; restore it, or use another "
            "name"
        )
    _check_artifacts(found, uri, local)
    return found.experiment_id


def _without(uri: str) -> str:
    if source_of(uri) == "--tracking-uri":
        return "omit --tracking-uri to log to --output"
    return "unset MLFLOW_TRACKING_URI to log to --output"


# what the MLflow UI shows above the runs, and that it shows them as those of models in training
_ABOUT = {
    "mlflow.note.content": (
        "Runs of raygkd. A search or a comparison is a parent run of the models it trained; its "
        "description ranks them."
    ),
    "mlflow.experimentKind": "custom_model_development",
}


def _experiment(uri: str, name: str, artifacts: str | None) -> Experiment:
    from mlflow.exceptions import MlflowException

    client = client_of(uri)
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            client.create_experiment(name, artifact_location=artifacts, tags=_ABOUT)
        except MlflowException as error:
            # another process was faster
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found = client.get_experiment_by_name(name)
    assert found is not None
    return found


def _check_artifacts(experiment: Experiment, uri: str, local: bool) -> None:
    """Refuse an experiment whose artifacts would go to the wrong machine, or nowhere.

    An experiment keeps the artifact location it was created with: a folder, or the server.
    """
    place, name = urlsplit(experiment.artifact_location), experiment.name
    if local and place.scheme == urlsplit(SERVED).scheme:
        raise TrackingError(
            f"--experiment {name}: was created through a server, which stores its artifacts; pass "
            "the server as --tracking-uri, or choose another --experiment"
        )
    folder = Path(unquote(place.path))
    # MLflow would make the folder here, and nobody would find what is in it
    if not local and place.scheme in ("", "file") and not folder.parent.is_dir():
        raise TrackingError(
            f"--experiment {name}: {shown(uri)} stores its artifacts in {folder}, which is not on "
            "this machine; use another --experiment, whose artifacts the server stores"
        )


def existing_store(what: str, uri: str) -> MlflowClient:
    """Return the client of an existing store; a missing store is not created."""
    if is_file(uri):
        path = _path_of(uri)
        # MLflow would make the tables of an empty one
        if not path.exists() or not path.stat().st_size:
            raise TrackingError(
                f"{what}: there is no MLflow store at {uri}; pass --output or --tracking-uri"
            )
        _open_file(path)
        move_places_along(path)
    return client_of(uri)


def probe(uri: str) -> str | None:
    """Return the contents of a usable store; None for a file that does not exist yet.

    Nothing is written.

    Args:
        uri: of the store or server.

    Raises:
        TrackingError: it does not answer, cannot be read or, if a file, cannot be written.
    """
    try:
        if uri.startswith("sqlite"):
            path = _path_of(uri)
            if not path.exists() or not path.stat().st_size:
                return None
            with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True)) as store:
                # takes the lock of whoever writes
                store.execute("BEGIN IMMEDIATE")
                store.rollback()
        client = client_of(uri)
        experiments = client.search_experiments()
    except Exception as error:
        silent = isinstance(error.__context__, OSError)
        reason = "no answer" if silent else short_reason(error, uri)
        raise TrackingError(f"{shown(uri)} cannot be used: {reason}") from error
    return f"{shown(uri)}, {len(experiments)} experiments"


def experiments(store: Path) -> dict[str, str]:
    """Return id -> name of the experiments in an existing SQLite store.

    Raises:
        TrackingError: the store cannot be read.
    """
    uri = default_uri(store.parent)
    try:
        found = client_of(uri).search_experiments()
    except Exception as error:
        reason = short_reason(error, uri)
        raise TrackingError(f"MLflow's store {store} cannot be used: {reason}") from error
    # MLflow's own is the first, and empty
    return {one.experiment_id: one.name for one in found if one.experiment_id != "0"}


def check_file(uri: str) -> None:
    """Check that a store can be used, if it is a file, as far as that does not need MLflow.

    Raises:
        TrackingError: the file is not an SQLite store, or cannot be written.
    """
    if is_file(uri):
        _open_file(_path_of(uri))


def _path_of(uri: str) -> Path:
    """Return the path of a store that is a file."""
    return Path(uri.partition("://")[2].removeprefix("/").partition("?")[0])


def _open_file(path: Path) -> None:
    try:
        with contextlib.closing(sqlite3.connect(path)) as store:
            store.execute("PRAGMA schema_version")
    except sqlite3.Error as error:
        raise TrackingError(
            f"MLflow's store {path} cannot be used: {error}; choose another --output, or another "
            "--tracking-uri"
        ) from error


# Alembic, which MLflow migrates with, has one state for all threads of a process
_MIGRATION = threading.Lock()


def make_store(path: Path, artifacts: str) -> None:
    """Create a SQLite store if there is none yet.

    MLflow's migrations corrupt the file if two processes run them at once or one is killed. So one
    process creates the store under a temporary name, and the others wait for it.

    Args:
        path: of the file; its folder exists.
        artifacts: default artifact URI of experiments.

    Raises:
        TrackingError: the file is not an SQLite store, or cannot be written.
    """
    _open_file(path)
    if path.stat().st_size:
        return
    lock, new = path.with_name(path.name + ".lock"), path.with_name(path.name + ".new")
    with _MIGRATION, lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not path.stat().st_size:
            new.unlink(missing_ok=True)
            _write_empty_store(new)
            with contextlib.closing(sqlite3.connect(new)) as store, store:
                # MLflow's own experiment
                own = f"{artifacts.rstrip('/')}/0"
                store.execute("UPDATE experiments SET artifact_location = ?", (own,))
            os.replace(new, path)
        # whoever still waits for it finds the store made
        lock.unlink(missing_ok=True)


def _write_empty_store(path: Path) -> None:
    """Write an empty store.

    MLflow makes one by all migrations that it ever had, which takes seconds. So the first one of a
    version of MLflow is kept in the user's cache, and copied from then on.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raygkd"
    kept = cache / f"mlflow-{version('mlflow')}.db"
    if kept.exists():
        shutil.copyfile(kept, path)
        return
    silence_mlflow()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    SqlAlchemyStore(f"sqlite:///{path}", path.parent.as_uri())
    # a home that cannot be written
    with contextlib.suppress(OSError, StorageError):
        cache.mkdir(parents=True, exist_ok=True)
        with whole_file(kept) as new:
            shutil.copyfile(path, new)
