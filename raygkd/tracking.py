"""MLflow: runs, curves and models. The only module that imports mlflow.

Whatever is logged goes to a journal on disk first and is sent from there by a thread, so that a
server that answers slowly, or not for a while, never holds up training and loses nothing. Sending
the same operation again changes nothing in MLflow, so that nothing is recorded twice either.

Shapes: B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import queue
import re
import sqlite3
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np

from raygkd.errors import StorageError, TrackingError
from raygkd.files import Place, is_remote, local_copy, make_folder, place
from raygkd.journal import open_journal
from raygkd.remote import RemotePath

# a server that is down must be noticed in seconds, and a request that MLflow repeats on its own
# could make a run twice: the thread here tries again by itself, and looks first
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# MLflow prints the URL of each run that ends, with the password that is in it
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

from mlflow import MlflowClient
from mlflow.entities import Experiment, LoggedModelInput, LoggedModelOutput, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

PARENT_TAG = "mlflow.parentRunId"
# what the UI shows above a run, as Markdown
DESCRIPTION_TAG = "mlflow.note.content"
# finds the run that a start has made although its answer was lost
START_TAG = "raygkd.start"
# aliases of a registered model: the version in use, and the one that may take its place
CHAMPION, CHALLENGER = "champion", "challenger"
# of a run: where its files are
FOLDER_TAG = "raygkd.folder"
# of an evaluation: the run that the model came from
EVALUATED_TAG = "raygkd.evaluated_run"
# of a run and of a version: digits that stand for its images and splits
IMAGES_TAG = "raygkd.images"
# where artifacts are that clients send to their server and ask it for
SERVED = "mlflow-artifacts:/"
_TAG_LIMIT = 5000
_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
_log = logging.getLogger(__name__)
# what goes wrong is told here in one line; MLflow would add tracebacks and hints
logging.getLogger("mlflow").setLevel(logging.CRITICAL)
logging.getLogger("alembic").setLevel(logging.CRITICAL)


def chosen_uri(given: str | None, output: str) -> str:
    """Return the URI of the store: the given one, the environment's, or that of the output folder.

    Args:
        given: ``--tracking-uri``.
        output: ``--output``.

    Raises:
        TrackingError: an output folder in an object store, which cannot hold a store of MLflow's.
    """
    uri = given or os.environ.get("MLFLOW_TRACKING_URI")
    if is_remote(output) and (uri is None or uri.startswith("sqlite")):
        raise TrackingError(
            f"--output {shown(output)}: needs --tracking-uri http://HOST:PORT of an MLflow server, "
            "since MLflow's own store is a file: start one with 'raygkd ui --host'"
        )
    return uri or default_uri(place(output))


def default_uri(output: Place) -> str:
    """Return the SQLite store inside a local output folder."""
    return f"sqlite:///{place(output / 'mlflow.db')}"


def connect(uri: str, experiment: str, output: Place) -> str:
    """Return the id of the experiment, made when it is new (and with it the store).

    Args:
        uri: of the store or server.
        experiment: its name.
        output: folder that holds the artifacts of a local store, and is local then too.

    Raises:
        TrackingError: the server does not answer, the store cannot be used, or the experiment's
            artifacts are kept where they cannot be written to from here.
    """
    scheme, separator, rest = uri.partition("://")
    scheme = scheme.partition("+")[0]
    if not separator or scheme not in _SCHEMES:
        raise TrackingError(
            f"--tracking-uri {shown(uri)}: must be sqlite:///FILE or http(s)://HOST:PORT (MLflow "
            "has no file stores any more)"
        )
    local = scheme == "sqlite"
    try:
        if local:
            assert isinstance(output, Path)
            artifacts = (output / "mlartifacts").resolve().as_uri()
            make_store(Path(rest.removeprefix("/").partition("?")[0]), artifacts)
        found = _experiment(uri, experiment, artifacts if local else None)
    except TrackingError:
        raise
    except Exception as error:
        # what requests raises is an OSError, and MLflow wraps it
        silent = isinstance(error.__context__, OSError)
        reason = "no answer" if silent else _reason(error, uri)
        raise TrackingError(
            f"MLflow at {shown(uri)} cannot be used: {reason}; start it, or leave out "
            "--tracking-uri to record in --output"
        ) from error
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"--experiment {experiment}: was deleted in {shown(uri)}; restore it, or use another "
            "name"
        )
    _check_artifacts(found, uri, local)
    return found.experiment_id


# what the MLflow UI shows above the runs, and that it shows them as those of models in training
_ABOUT = {
    "mlflow.note.content": (
        "Runs of raygkd. A search and a comparison are runs that hold what they trained; their "
        "description ranks it."
    ),
    "mlflow.experimentKind": "custom_model_development",
}


def _experiment(uri: str, name: str, artifacts: str | None) -> Experiment:
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
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

    An experiment keeps the place that it was made with: a folder, or a server's own.
    """
    place, name = urlsplit(experiment.artifact_location), experiment.name
    if local and place.scheme == urlsplit(SERVED).scheme:
        raise TrackingError(
            f"--experiment {name}: was made through a server, which takes its artifacts; give the "
            "server as --tracking-uri, or another --experiment"
        )
    folder = Path(unquote(place.path))
    # MLflow would make the folder here, and nobody would find what is in it
    if not local and place.scheme in ("", "file") and not folder.parent.is_dir():
        raise TrackingError(
            f"--experiment {name}: {shown(uri)} keeps its artifacts in {folder}, which is not on "
            "this machine; use another --experiment, whose artifacts the server takes"
        )


@dataclass(frozen=True, kw_only=True)
class Registered:
    """A version of a registered model that a run of raygkd has made.

    Attributes:
        name: of the registered model.
        version: its number.
        tags: of the version.
        run_id: of the MLflow run that it came from.
        folder: of that run.
    """

    name: str
    version: str
    tags: Mapping[str, str]
    run_id: str
    folder: str


def registered(model: str, uri: str) -> Registered:
    """Return a version of a registered model.

    Args:
        model: ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.
        uri: of the store or server.

    Raises:
        TrackingError: there is no such model or run, or the server does not answer.
    """
    parts = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/([0-9]+))", model)
    if parts is None:
        raise TrackingError(f"MODEL {model}: must be models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, number = parts.groups()
    client = _existing_store(f"MODEL {model}", uri)
    try:
        if alias:
            version = client.get_model_version_by_alias(name, alias)
        else:
            version = client.get_model_version(name, number)
        tags = client.get_run(version.run_id).data.tags if version.run_id else {}
    except Exception as error:
        raise TrackingError(f"MODEL {model}: {_reason(error, uri)} ({shown(uri)})") from error
    if version.run_id is None or FOLDER_TAG not in tags:
        raise TrackingError(f"MODEL {model}: was not registered by a run of raygkd")
    return Registered(
        name=name,
        version=str(version.version),
        tags=dict(version.tags),
        run_id=version.run_id,
        folder=tags[FOLDER_TAG],
    )


def aliases(name: str, uri: str) -> dict[str, str]:
    """Return alias -> version of a registered model.

    Args:
        name: of the registered model.
        uri: of the store or server.

    Raises:
        TrackingError: there is no such model, or the server does not answer.
    """
    client = _existing_store(f"NAME {name}", uri)
    try:
        found = client.get_registered_model(name).aliases
    except Exception as error:
        raise TrackingError(f"NAME {name}: {_reason(error, uri)} ({shown(uri)})") from error
    return {alias: str(version) for alias, version in found.items()}


def decide(candidate: Registered, uri: str, *, promoted: bool, tags: Mapping[str, str]) -> None:
    """Note on a version what came of its comparison with the champion, and make it that if it won.

    Args:
        candidate: the version.
        uri: of the store or server.
        promoted: whether it is the champion now, and no challenger any more.
        tags: what the version is told.

    Raises:
        TrackingError: the server does not answer, or refuses it.
    """
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    try:
        for name, value in tags.items():
            client.set_model_version_tag(candidate.name, candidate.version, name, value)
        if promoted:
            client.set_registered_model_alias(candidate.name, CHAMPION, candidate.version)
            client.delete_registered_model_alias(candidate.name, CHALLENGER)
    except Exception as error:
        raise TrackingError(
            f"NAME {candidate.name}: {_reason(error, uri)} ({shown(uri)})"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where MLflow has a model.

    Attributes:
        uri: of the store or server.
        run_id: of the run that it came from.
    """

    uri: str
    run_id: str


def record_evaluation(
    origin: Origin,
    *,
    name: str,
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
    figures: Sequence[Path],
) -> str:
    """Record an evaluation as a run beside the one that the model came from; return its id.

    Its metrics are the logged model's as well, where there is one.

    Args:
        origin: of the model.
        name: of the run, as the UI shows it.
        metrics: numbers; what is not finite is left out.
        tags: facts about it.
        figures: pictures.

    Raises:
        TrackingError: the store is gone, does not answer, or refuses it.
    """
    client = _existing_store("MLflow", origin.uri)
    now = int(time.time() * 1000)
    try:
        source = client.get_run(origin.run_id)
        # a search logs the winner, and other runs log none
        logged = source.outputs.model_outputs if source.outputs else []
        model_id = logged[0].model_id if logged else None
        experiment = source.info.experiment_id
        told = {**tags, EVALUATED_TAG: origin.run_id}
        run_id = client.create_run(experiment, run_name=name, tags=told).info.run_id
        try:
            if model_id is not None:
                client.log_inputs(run_id, models=[LoggedModelInput(model_id)])
            entries = [
                Metric(metric, value, now, 0, model_id=model_id)
                for metric, value in metrics.items()
                if math.isfinite(value)
            ]
            client.log_batch(run_id, metrics=entries)
            for figure in figures:
                client.log_artifact(run_id, str(figure))
        except BaseException:
            # the first error is the one to tell
            with contextlib.suppress(MlflowException, OSError):
                client.set_terminated(run_id, "FAILED")
            raise
        client.set_terminated(run_id)
    except Exception as error:
        raise TrackingError(
            f"MLflow at {shown(origin.uri)}: {_reason(error, origin.uri)}"
        ) from error
    return run_id


def _existing_store(what: str, uri: str) -> MlflowClient:
    """Return the client of a store, which asking for something must not make."""
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise TrackingError(
            f"{what}: there is no MLflow store at {uri}: give --output or --tracking-uri"
        )
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def probe(uri: str) -> str | None:
    """Return what a store that can be used holds, None where it is a file that is not made yet.

    Nothing is written.

    Args:
        uri: of the store or server.

    Raises:
        TrackingError: it does not answer, or cannot be read or, as far as it is a file, written.
    """
    try:
        if uri.startswith("sqlite"):
            path = Path(uri.partition("://")[2].removeprefix("/").partition("?")[0])
            if not path.exists() or not path.stat().st_size:
                return None
            with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True)) as store:
                # takes the lock of whoever writes
                store.execute("BEGIN IMMEDIATE")
                store.rollback()
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        experiments = client.search_experiments()
    except Exception as error:
        silent = isinstance(error.__context__, OSError)
        reason = "no answer" if silent else _reason(error, uri)
        raise TrackingError(f"{shown(uri)} cannot be used: {reason}") from error
    return f"{shown(uri)}, {len(experiments)} experiments"


def experiments(store: Path) -> dict[str, str]:
    """Return id -> name of the experiments in a SQLite store that somebody has made.

    Raises:
        TrackingError: the store cannot be read.
    """
    uri = default_uri(store.parent)
    try:
        found = MlflowClient(tracking_uri=uri, registry_uri=uri).search_experiments()
    except Exception as error:
        reason = _reason(error, uri)
        raise TrackingError(f"MLflow's store {store} cannot be used: {reason}") from error
    # MLflow's own is the first, and empty
    return {one.experiment_id: one.name for one in found if one.experiment_id != "0"}


def make_store(path: Path, artifacts: str) -> None:
    """Make a SQLite store where there is none yet.

    MLflow's migrations break a file on which two processes run them at once, or one that is
    killed: so one process makes the store, under another name, and the others wait for it.

    Args:
        path: of the file; its folder is there.
        artifacts: URI where experiments keep their artifacts that name no place of their own.

    Raises:
        TrackingError: the file is no SQLite store, or cannot be written.
    """
    try:
        with contextlib.closing(sqlite3.connect(path)) as store:
            store.execute("PRAGMA schema_version")
    except sqlite3.Error as error:
        raise TrackingError(
            f"MLflow's store {path} cannot be used: {error}; give another --output, or another "
            "--tracking-uri"
        ) from error
    if path.stat().st_size:
        return
    lock, new = path.with_name(path.name + ".lock"), path.with_name(path.name + ".new")
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not path.stat().st_size:
            from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

            new.unlink(missing_ok=True)
            SqlAlchemyStore(f"sqlite:///{new}", artifacts)
            os.replace(new, path)
        # whoever still waits for it finds the store made
        lock.unlink(missing_ok=True)


def _user_info(uri: str) -> str:
    """Return the "user:password@" of a URI, or nothing."""
    scheme, _, rest = uri.partition("://")
    user, at, _ = rest.rpartition("@")
    return "" if scheme.startswith("sqlite") else user + at


def shown(uri: str) -> str:
    """Return a URI without the user name and password it may hold."""
    user_info = _user_info(uri)
    return uri.replace(user_info, "", 1).partition("?")[0] if user_info else uri


def _without_secrets(text: str, uri: str) -> str:
    """Return a text without the user names and passwords of the URIs in it."""
    user_info = _user_info(uri)
    text = text.replace(user_info, "") if user_info else text
    return re.sub(r"(?<=://)[^/\s@]*@", "", text)


def _reason(error: Exception, uri: str) -> str:
    """Return an error as a short line without secrets."""
    # SQLAlchemy puts advice before and the whole statement after what the store says
    told = " ".join(str(error).split()).partition(" [SQL: ")[0].rpartition("prematurely) ")[2]
    text = _without_secrets(told, uri)[:200]
    return text if isinstance(error, MlflowException) else f"{type(error).__name__}: {text}"


def _may_pass(error: Exception) -> bool:
    """Return whether the same request may succeed later: no answer, or the server's own fault."""
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
    elif (response := getattr(error, "response", None)) is not None:
        status = response.status_code
    else:
        # requests' errors are OSErrors without the number that the system's have
        silent = isinstance(error, OSError) and error.errno is None
        return silent or isinstance(error, ConnectionError | TimeoutError)
    return status >= 500 or status in (408, 429, 499)


@contextlib.contextmanager
def _store_of_artifacts() -> Iterator[None]:
    """Raise what a broken artifact store answers as a refusal: it must not hold up the numbers."""
    try:
        yield
    except OSError as error:
        if getattr(error, "response", None) is not None:
            raise TrackingError(str(error)) from error
        raise


@dataclass(frozen=True, kw_only=True)
class LoggedModel:
    """Where a model went: its MLflow URI, registered name, version, and the version's alias."""

    uri: str
    name: str
    version: str
    alias: str


class Tracker:
    """Records runs in one MLflow experiment, from the driver.

    Runs are named by keys of the caller's; the MLflow run id is made when the server answers.
    A journal that exists already is taken up again: known keys go on in their old runs, and what
    had not been sent is sent. What the server refuses is a warning, and stays in the journal.

    Args:
        uri: of the MLflow store or server; ``connect`` has found it usable.
        experiment_id: from ``connect``.
        journal: place of the journal of all that was logged, a JSON object a line.

    Attributes:
        uri: without the user name and password it may hold.
        experiment_id, journal: as given.
    """

    def __init__(self, uri: str, experiment_id: str, journal: Place):
        self.uri = shown(uri)
        self.experiment_id = experiment_id
        self.journal = journal
        self._journal = open_journal(journal)
        self._secret_uri = uri
        self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        self._run_ids: dict[str, str] = {}
        self._models: dict[str, LoggedModel] = {}
        self._open: set[str] = set()
        self._starting: set[str] = set()
        self._logged: set[tuple[str, str, int]] = set()
        self._told: set[tuple[str, str]] = set()
        self._sequence = 0
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._lock = threading.Lock()
        self._failing = False
        self._unwritable = False
        self._all_sent = False
        self._closing = threading.Event()
        self._deadline = math.inf
        make_folder(journal.parent)
        self._take_up()
        self._thread = threading.Thread(target=self._send_all, name="mlflow-sender", daemon=True)
        self._thread.start()

    def start(
        self,
        key: str,
        name: str,
        *,
        parent: str | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        texts: Mapping[str, str] | None = None,
    ) -> None:
        """Open a run, or go on in the one that was open under this key.

        Args:
            key: what the caller calls it.
            name: what the UI shows.
            parent: key of the parent run.
            params: the settings that vary between runs.
            tags: facts about it.
            texts: artifact file name -> its text.
        """
        self._append(
            "start",
            key,
            name=name,
            parent=parent,
            token=uuid.uuid4().hex,
            params=self._strings(params or {}),
            tags=self._strings(tags or {}),
        )
        for file, text in self._strings(texts or {}).items():
            self._append("text", key, file=file, text=text)

    def is_open(self, key: str) -> bool:
        """Return whether a run has been started and not ended."""
        return key in self._open

    def metrics(self, key: str, values: Mapping[str, float], *, step: int) -> None:
        """Log numbers of one step (an epoch).

        What is not finite is left out, and so is what a resumed run reports a second time.
        """
        new = {
            name: float(value)
            for name, value in values.items()
            if math.isfinite(value) and (key, name, step) not in self._logged
        }
        if new:
            self._append("metrics", key, step=step, values=new)

    def tags(self, key: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run."""
        self._append("tags", key, tags=self._strings(tags))

    def figure(self, key: str, path: Place) -> None:
        """Upload a picture to a run."""
        self._append("figure", key, path=str(path))

    def end(self, key: str, status: str = "FINISHED") -> None:
        """Close a run as FINISHED, FAILED or KILLED."""
        self._append("end", key, status=status)

    def run_id(self, key: str, timeout: float = 20.0) -> str | None:
        """Return the MLflow id of a run, waiting for the server; None if it does not answer."""
        deadline = time.monotonic() + timeout
        while (
            key in self._starting
            and key not in self._run_ids
            and not self._failing
            and self._thread.is_alive()
            and time.monotonic() < deadline
        ):
            time.sleep(0.02)
        return self._run_ids.get(key)

    def model(
        self,
        key: str,
        model: Any,
        example_BCHW: np.ndarray,
        *,
        register_as: str,
        description: str,
        tags: Mapping[str, str],
    ) -> LoggedModel | None:
        """Log a model and register a version with an alias.

        The first version is the "champion"; a later one becomes the "challenger".

        Returns None, with a warning, if that fails. It is done once for a run: a process that goes
        on with the journal of one that has done it returns what that one did.

        Args:
            key: the run.
            model: a module of images (B, C, H, W) to logits (B, K), on the CPU; or the place of
                a detector's model file, which is loaded by ``raygkd.deployed``.
            example_BCHW: float32 images that the signature and a served model's schema come from.
            register_as: name of the registered model.
            description: of the version, as Markdown.
            tags: of the version, such as the scores that chose it.
        """
        if key in self._models:
            return self._models[key]
        run_id = self.run_id(key)
        try:
            if run_id is None:
                raise TrackingError("the run could not be made")
            logged = _log_model(self._client, self.experiment_id, run_id, model, example_BCHW)
            version, alias = _register(
                self._client, register_as, logged, self._strings(tags), description
            )
        except Exception as error:
            # whatever it is, it must not cost the training that came before
            reason = _reason(error, self._secret_uri)
            _log.warning("MLflow at %s has no model of run '%s': %s", self.uri, key, reason)
            return None
        model_of_run = LoggedModel(
            uri=logged.model_uri, name=register_as, version=version, alias=alias
        )
        with self._lock:
            self._write({"key": key, "model": asdict(model_of_run)})
        return model_of_run

    def close(self, status: str = "FINISHED", timeout: float = 10.0) -> None:
        """End all open runs, then wait until everything is sent.

        Warns when the server does not take it in ``timeout`` seconds: the journal keeps it, and a
        Tracker on the same journal sends it. Where the journal cannot be written, which is what
        ended the runs then, MLflow alone is told.
        """
        for key in sorted(self._open):
            try:
                self.end(key, status)
            except StorageError:
                self._queue.put(self._operation("end", key, status=status))
        self._deadline = time.monotonic() + timeout
        self._closing.set()
        self._queue.put(None)
        self._thread.join(timeout)
        if not self._all_sent:
            _log.warning(
                "MLflow at %s has not taken everything; it is kept in %s and is sent when this "
                "run is resumed",
                self.uri,
                self.journal,
            )

    # the journal

    def _take_up(self) -> None:
        """Go on from the journal of an earlier process, if there is one."""
        entries = read_journal(self.journal)
        sent = {entry["sent"] for entry in entries if "sent" in entry}
        for entry in entries:
            if "run_id" in entry:
                self._run_ids[entry["key"]] = entry["run_id"]
            elif "model" in entry:
                self._models[entry["key"]] = LoggedModel(**entry["model"])
            elif "op" in entry:
                self._note(entry)
                if entry["sequence"] not in sent:
                    self._queue.put(entry)

    def _append(self, op: str, key: str, **fields: Any) -> None:
        """Write an operation to the journal and queue it."""
        with self._lock:
            operation = self._operation(op, key, sequence=self._sequence, **fields)
            self._note(operation)
            self._write(operation)
            self._queue.put(operation)

    def _operation(self, op: str, key: str, **fields: Any) -> dict[str, Any]:
        return {"op": op, "key": key, **fields, "time": int(time.time() * 1000)}

    def _note(self, operation: dict[str, Any]) -> None:
        """Keep in mind what an operation in the journal means for later ones."""
        key = operation["key"]
        self._sequence = operation["sequence"] + 1
        if operation["op"] == "start":
            self._open.add(key)
            self._starting.add(key)
        elif operation["op"] == "end":
            self._open.discard(key)
        elif operation["op"] == "metrics":
            self._logged |= {(key, name, operation["step"]) for name in operation["values"]}

    def _write(self, entry: dict[str, Any]) -> None:
        self._journal.append(json.dumps(entry))

    def _strings(self, values: Mapping[str, Any]) -> dict[str, str]:
        return {
            name: _without_secrets(str(value), self._secret_uri) for name, value in values.items()
        }

    # the thread

    def _send_all(self) -> None:
        while (operation := self._queue.get()) is not None:
            if not self._send(operation):
                return
        self._all_sent = True

    def _send(self, operation: dict[str, Any]) -> bool:
        """Send one operation until the server takes or refuses it; False if closed before."""
        op, key = operation["op"], operation["key"]
        wait = 0.1
        while op == "start" or key in self._run_ids:
            try:
                getattr(self, "_send_" + op)(operation)
            except Exception as error:
                if not _may_pass(error):
                    self._tell_refusal(operation, error)
                    break
                self._tell_outage(error)
            else:
                self._failing = False
                if "sequence" in operation:
                    self._write_down({"sent": operation["sequence"]})
                break
            if self._closing.wait(wait):
                if time.monotonic() > self._deadline:
                    return False
                time.sleep(0.1)
            wait = min(2 * wait, 5.0)
        if op == "start":
            self._starting.discard(key)
        return True

    def _write_down(self, entry: dict[str, Any]) -> None:
        """Write what MLflow has done; where it is not written, it is only asked for it again."""
        try:
            with self._lock:
                self._write(entry)
        except StorageError as error:
            if not self._unwritable:
                self._unwritable = True
                _log.warning(
                    "what MLflow at %s takes is sent again when this run is resumed: %s",
                    self.uri,
                    error,
                )

    def _tell_outage(self, error: Exception) -> None:
        if not self._failing:
            self._failing = True
            _log.warning(
                "MLflow at %s does not answer (%s); training goes on and everything is kept in %s",
                self.uri,
                _reason(error, self._secret_uri),
                self.journal,
            )

    def _tell_refusal(self, operation: dict[str, Any], error: Exception) -> None:
        """Warn once for each run and kind of operation, not for each epoch."""
        self._failing = False
        subject = operation["key"], operation["op"]
        if subject not in self._told:
            self._told.add(subject)
            _log.warning(
                "MLflow at %s refuses '%s' of run '%s' (%s); it is kept in %s",
                self.uri,
                operation["op"],
                operation["key"],
                _reason(error, self._secret_uri),
                self.journal,
            )

    def _send_start(self, operation: dict[str, Any]) -> None:
        key = operation["key"]
        if key in self._run_ids:
            self._client.update_run(self._run_ids[key], status="RUNNING")
        else:
            run_id = self._find_run(operation["token"]) or self._create_run(operation)
            self._write_down({"key": key, "run_id": run_id})
            self._run_ids[key] = run_id
        params = [Param(name, value) for name, value in operation["params"].items()]
        self._client.log_batch(self._run_ids[key], params=params, tags=_tags(operation))

    def _find_run(self, token: str) -> str | None:
        found = self._client.search_runs(
            [self.experiment_id], filter_string=f"tags.`{START_TAG}` = '{token}'", max_results=1
        )
        return found[0].info.run_id if found else None

    def _create_run(self, operation: dict[str, Any]) -> str:
        tags = {START_TAG: operation["token"]}
        # a parent that was refused does not cost the child
        if operation["parent"] in self._run_ids:
            tags[PARENT_TAG] = self._run_ids[operation["parent"]]
        run = self._client.create_run(
            self.experiment_id,
            run_name=operation["name"],
            tags=tags,
            start_time=operation["time"],
        )
        return run.info.run_id

    def _send_text(self, operation: dict[str, Any]) -> None:
        run_id = self._run_ids[operation["key"]]
        with _store_of_artifacts():
            self._client.log_text(run_id, operation["text"], operation["file"])

    def _send_figure(self, operation: dict[str, Any]) -> None:
        with local_copy(place(operation["path"])) as path, _store_of_artifacts():
            self._client.log_artifact(self._run_ids[operation["key"]], str(path))

    def _send_metrics(self, operation: dict[str, Any]) -> None:
        entries = [
            Metric(name, value, operation["time"], operation["step"])
            for name, value in operation["values"].items()
        ]
        self._client.log_batch(self._run_ids[operation["key"]], metrics=entries)

    def _send_tags(self, operation: dict[str, Any]) -> None:
        self._client.log_batch(self._run_ids[operation["key"]], tags=_tags(operation))

    def _send_end(self, operation: dict[str, Any]) -> None:
        self._client.set_terminated(
            self._run_ids[operation["key"]], operation["status"], end_time=operation["time"]
        )


def _tags(operation: dict[str, Any]) -> list[RunTag]:
    return [RunTag(name, value[:_TAG_LIMIT]) for name, value in operation["tags"].items()]


def read_journal(path: Place) -> list[dict[str, Any]]:
    """Return the entries of a journal; none if there is nothing.

    Raises:
        TrackingError: another line is damaged.
    """
    entries = []
    for number, line in enumerate(open_journal(path).lines(), start=1):
        try:
            entries.append(json.loads(line))
        except ValueError:
            raise TrackingError(f"{path} line {number} is damaged: delete the line") from None
    return entries


def _log_model(
    client: MlflowClient,
    experiment_id: str,
    run_id: str,
    model: Any,
    example_BCHW: np.ndarray,
) -> Any:
    """Log a model, through the client alone; return MLflow's record of it.

    ``mlflow.pytorch.log_model`` goes by global state, prints, and loads the model to try it.
    """
    logged = client.create_logged_model(experiment_id, "student", source_run_id=run_id)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            _save_model(path, model, example_BCHW, logged)
            client.log_model_artifacts(logged.model_id, str(path))
    except BaseException:
        # the first error is the one to tell
        with contextlib.suppress(MlflowException):
            client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return logged


def _save_model(path: Path, model: Any, example_BCHW: np.ndarray, logged: Any) -> None:
    """Write a folder in MLflow's format for the model that ``logged`` announces."""
    from mlflow.models import Model

    facts = Model(
        artifact_path=logged.artifact_location,
        run_id=logged.source_run_id,
        model_uuid=logged.model_id,
        model_id=logged.model_id,
    )
    if isinstance(model, Path | RemotePath):
        with local_copy(model) as file:
            _save_detector(path, file, example_BCHW, facts)
    else:
        _save_classifier(path, model, example_BCHW, facts)


def _save_classifier(path: Path, model: Any, example_BCHW: np.ndarray, facts: Any) -> None:
    import mlflow.pytorch
    import torch
    from mlflow.models import infer_signature

    # the export takes the number of images for free only where it sees more than one
    example_BCHW = np.resize(example_BCHW, (max(2, len(example_BCHW)), *example_BCHW.shape[1:]))
    with torch.no_grad():
        logits_BK = model.eval()(torch.from_numpy(example_BCHW)).numpy()
    mlflow.pytorch.save_model(
        model,
        path,
        mlflow_model=facts,
        input_example=example_BCHW,
        signature=infer_signature(example_BCHW, logits_BK),
        # torch.export's graph needs neither pickle nor raygkd where the model is loaded
        serialization_format="pt2",
        pip_requirements=[
            f"torch=={torch.__version__.split('+')[0]}",
            f"numpy=={np.__version__}",
        ],
    )


def _save_detector(path: Path, file: Path, example_BCHW: np.ndarray, facts: Any) -> None:
    import mlflow.pyfunc
    from mlflow.models import infer_signature

    from raygkd import __version__, deployed

    detections_BD6 = deployed.Predictor(str(file)).predict(example_BCHW)
    # torchvision's detectors cannot be exported, since the number of their boxes is not known
    mlflow.pyfunc.save_model(
        path,
        loader_module=deployed.__name__,
        data_path=str(file),
        mlflow_model=facts,
        input_example=example_BCHW,
        signature=infer_signature(example_BCHW, detections_BD6),
        pip_requirements=[f"raygkd=={__version__}"],
    )


def _register(
    client: MlflowClient, name: str, logged: Any, tags: Mapping[str, str], description: str
) -> tuple[str, str]:
    """Make a version of a registered model; return its number and alias."""
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = client.create_model_version(
        name,
        # its place, and not its models:/ URI, which a store would look up at the global tracking
        # URI
        logged.artifact_location,
        run_id=logged.source_run_id,
        model_id=logged.model_id,
        tags=dict(tags),
        description=description,
    ).version
    held = client.get_registered_model(name).aliases
    alias = CHALLENGER if CHAMPION in held else CHAMPION
    client.set_registered_model_alias(name, alias, str(version))
    link = json.dumps([{"name": name, "version": str(version)}])
    client.set_logged_model_tags(logged.model_id, {"mlflow.modelVersions": link})
    return str(version), alias
