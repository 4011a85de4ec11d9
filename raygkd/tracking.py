"""MLflow: runs, curves and models. The only module that imports mlflow.

Whatever is logged goes to a journal on disk first and is sent from there by a thread, so that a
server that answers slowly, or not for a while, never holds up training and loses nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import queue
import sqlite3
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raygkd.errors import TrackingError

# a server that is down must be noticed in seconds, and the thread here retries by itself
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

PARENT_TAG = "mlflow.parentRunId"
_TAG_LIMIT = 5000
_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
logging.getLogger("alembic").setLevel(logging.WARNING)
logging.getLogger("mlflow").setLevel(logging.WARNING)


def default_uri(output: Path) -> str:
    """Return the SQLite store inside an output folder."""
    return f"sqlite:///{(output / 'mlflow.db').resolve()}"


def connect(uri: str, experiment: str, output: Path) -> str:
    """Return the id of the experiment, made when it is new (and with it the store).

    Args:
        uri: of the store or server.
        experiment: its name.
        output: folder that holds the artifacts of a local store.

    Raises:
        TrackingError: the server does not answer, or the store cannot be used.
    """
    scheme, separator, _ = uri.partition("://")
    if not separator or scheme.partition("+")[0] not in _SCHEMES:
        raise TrackingError(
            f"--tracking-uri {_shown(uri)}: must be sqlite:///FILE or http(s)://HOST:PORT (MLflow "
            "has no file stores any more)"
        )
    if uri.startswith("sqlite:///"):
        _check_sqlite(uri.removeprefix("sqlite:///"))
    try:
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        found = client.get_experiment_by_name(experiment)
        if found is not None and found.lifecycle_stage == "deleted":
            raise TrackingError(
                f"--experiment {experiment}: was deleted in {_shown(uri)}; restore it, or use "
                "another name"
            )
        if found is not None:
            return found.experiment_id
        artifacts = (
            (output / "mlartifacts").resolve().as_uri() if uri.startswith("sqlite") else None
        )
        return client.create_experiment(experiment, artifact_location=artifacts)
    except (MlflowException, OSError) as error:
        # what requests raises is an OSError too
        silent = isinstance(error.__context__, OSError)
        reason = "no answer" if silent else " ".join(str(error).split())[:200]
        raise TrackingError(
            f"MLflow at {_shown(uri)} cannot be used: {reason}; start it, or leave out "
            "--tracking-uri to record in --output"
        ) from error


def _check_sqlite(path: str) -> None:
    """Raise a TrackingError for a file that MLflow would try to open again and again."""
    try:
        with contextlib.closing(sqlite3.connect(path)) as store:
            store.execute("PRAGMA schema_version")
    except sqlite3.Error as error:
        raise TrackingError(
            f"MLflow's store {path} cannot be used: {error}; give another --output, or another "
            "--tracking-uri"
        ) from error


def _shown(uri: str) -> str:
    """Return a URI without the user name and password it may hold."""
    scheme, separator, rest = uri.partition("://")
    return scheme + separator + rest.rpartition("@")[2]


@dataclass(frozen=True, kw_only=True)
class LoggedModel:
    """Where a model went: its MLflow URI, registered name and version."""

    uri: str
    name: str
    version: str


class Tracker:
    """Records runs in one MLflow experiment, from the driver.

    Runs are named by keys of the caller's; the MLflow run id is made when the server answers.
    A journal that exists already is taken up again: known keys go on in their old runs, and what
    had not been sent is sent.

    Args:
        uri: of the MLflow store or server; ``connect`` has found it usable.
        experiment_id: from ``connect``.
        journal: file of all that was logged, a JSON object a line.
    """

    def __init__(self, uri: str, experiment_id: str, journal: Path):
        self.uri = uri
        self.experiment_id = experiment_id
        self.journal = journal
        self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        self._run_ids: dict[str, str] = {}
        self._open: set[str] = set()
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._lock = threading.Lock()
        self._failing_since: float | None = None
        self._closing = threading.Event()
        journal.parent.mkdir(parents=True, exist_ok=True)
        self._sequence = self._take_up()
        self._thread = threading.Thread(target=self._send_all, name="mlflow-sender", daemon=True)
        self._thread.start()

    def _take_up(self) -> int:
        """Read an earlier journal; return the next sequence number."""
        if not self.journal.exists():
            return 0
        entries = read_journal(self.journal)
        sent = {entry["sent"] for entry in entries if "sent" in entry}
        self._run_ids = {entry["key"]: entry["run_id"] for entry in entries if "run_id" in entry}
        operations = [entry for entry in entries if "op" in entry]
        for operation in operations:
            if operation["sequence"] not in sent:
                self._queue.put(operation)
        return len(operations)

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
        self._open.add(key)
        self._append(
            {
                "op": "start",
                "key": key,
                "name": name,
                "parent": parent,
                "params": {name: str(value) for name, value in (params or {}).items()},
                "tags": dict(tags or {}),
                "texts": dict(texts or {}),
            }
        )

    def metrics(self, key: str, values: Mapping[str, float], *, step: int) -> None:
        """Log numbers of one step (an epoch); what is not finite is left out."""
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        self._append({"op": "metrics", "key": key, "step": step, "values": finite})

    def tags(self, key: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run."""
        self._append({"op": "tags", "key": key, "tags": dict(tags)})

    def end(self, key: str, status: str = "FINISHED") -> None:
        """Close a run as FINISHED, FAILED or KILLED."""
        self._open.discard(key)
        self._append({"op": "end", "key": key, "status": status})

    def run_id(self, key: str, timeout: float = 20.0) -> str | None:
        """Return the MLflow id of a run, waiting for the server; None if it did not answer."""
        deadline = time.monotonic() + timeout
        while key not in self._run_ids and time.monotonic() < deadline and self._thread.is_alive():
            time.sleep(0.02)
        return self._run_ids.get(key)

    def close(self, status: str = "FINISHED", timeout: float = 30.0) -> None:
        """End all open runs, then wait until everything is sent.

        Warns when the server does not take it in ``timeout`` seconds: the journal keeps it, and a
        Tracker on the same journal sends it.
        """
        for key in sorted(self._open):
            self.end(key, status)
        self._closing.set()
        self._queue.put(None)
        self._thread.join(timeout)
        if self._thread.is_alive():
            warnings.warn(
                f"MLflow at {_shown(self.uri)} has not taken everything; it is kept in "
                f"{self.journal} and is sent when this run is resumed",
                stacklevel=2,
            )

    def _append(self, operation: dict[str, Any]) -> None:
        with self._lock:
            operation |= {"sequence": self._sequence, "time": int(time.time() * 1000)}
            self._sequence += 1
            self._write(operation)
        self._queue.put(operation)

    def _write(self, entry: dict[str, Any]) -> None:
        with self.journal.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def _send_all(self) -> None:
        while (operation := self._queue.get()) is not None:
            self._send(operation)
            with self._lock:
                self._write({"sent": operation["sequence"]})

    def _send(self, operation: dict[str, Any]) -> None:
        """Send one operation; try again until the server takes it."""
        wait = 0.2
        while True:
            try:
                getattr(self, "_send_" + operation["op"])(operation)
            except (MlflowException, OSError) as error:
                if self._failing_since is None:
                    self._failing_since = time.monotonic()
                    reason = " ".join(str(error).split())[:200]
                    warnings.warn(
                        f"MLflow at {_shown(self.uri)} does not answer ({reason}); training goes "
                        f"on and everything is kept in {self.journal}",
                        stacklevel=2,
                    )
                time.sleep(wait)
                wait = min(2 * wait, 5.0)
            else:
                self._failing_since = None
                return

    def _send_start(self, operation: dict[str, Any]) -> None:
        key, run_id = operation["key"], self._run_ids.get(operation["key"])
        if run_id is not None:
            self._client.update_run(run_id, status="RUNNING")
            return
        tags = dict(operation["tags"])
        if operation["parent"] is not None:
            tags[PARENT_TAG] = self._run_ids[operation["parent"]]
        tags = {name: str(value)[:_TAG_LIMIT] for name, value in tags.items()}
        run = self._client.create_run(
            self.experiment_id,
            run_name=operation["name"],
            tags=tags,
            start_time=operation["time"],
        )
        run_id = run.info.run_id
        params = [Param(name, value) for name, value in operation["params"].items()]
        self._client.log_batch(run_id, params=params)
        for file_name, text in operation["texts"].items():
            self._client.log_text(run_id, text, file_name)
        with self._lock:
            self._write({"key": key, "run_id": run_id})
        self._run_ids[key] = run_id

    def _send_metrics(self, operation: dict[str, Any]) -> None:
        entries = [
            Metric(name, value, operation["time"], operation["step"])
            for name, value in operation["values"].items()
        ]
        self._client.log_batch(self._run_ids[operation["key"]], metrics=entries)

    def _send_tags(self, operation: dict[str, Any]) -> None:
        tags = [RunTag(name, str(value)[:_TAG_LIMIT]) for name, value in operation["tags"].items()]
        self._client.log_batch(self._run_ids[operation["key"]], tags=tags)

    def _send_end(self, operation: dict[str, Any]) -> None:
        self._client.set_terminated(
            self._run_ids[operation["key"]], operation["status"], end_time=operation["time"]
        )

    def figure(self, key: str, path: Path) -> None:
        """Upload a picture to a run; a failure is a warning."""
        self._guarded(
            f"picture {path.name}", lambda run_id: self._client.log_artifact(run_id, str(path)), key
        )

    def model(
        self, key: str, model: Any, example_BCHW: np.ndarray, *, register_as: str
    ) -> LoggedModel | None:
        """Log a torch model, register a version and point the alias "champion" at it.

        The run ends with this. Returns None, with a warning, if the server refuses.

        Args:
            key: the run.
            model: a module of images (B, 3, H, W) in 0..1 to logits (B, K), on the CPU.
            example_BCHW: input that the signature and a served model's schema come from.
            register_as: name of the registered model.
        """

        def log(run_id: str) -> LoggedModel:
            with self._fluent():
                return _log_model(self._client, run_id, model, example_BCHW, register_as)

        return self._guarded("model", log, key)

    def _guarded(self, what: str, action: Callable[[str], Any], key: str) -> Any:
        run_id = self.run_id(key)
        try:
            if run_id is None:
                raise TrackingError("the run could not be created")
            return action(run_id)
        except (MlflowException, OSError, TrackingError) as error:
            reason = " ".join(str(error).split())[:200]
            warnings.warn(f"MLflow did not take the {what}: {reason}", stacklevel=3)
            return None

    @contextlib.contextmanager
    def _fluent(self) -> Iterator[None]:
        """Point mlflow's module-level functions at this store, for what the client cannot do."""
        before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
        mlflow.set_tracking_uri(self.uri)
        mlflow.set_registry_uri(self.uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(before[0])
            mlflow.set_registry_uri(before[1])


def _log_model(
    client: MlflowClient, run_id: str, model: Any, example_BCHW: np.ndarray, register_as: str
) -> LoggedModel:
    import torch
    from mlflow.models import infer_signature

    with torch.no_grad():
        logits_BK = model.eval()(torch.from_numpy(example_BCHW)).numpy()
    with mlflow.start_run(run_id=run_id):
        info = mlflow.pytorch.log_model(
            model,
            name="student",
            input_example=example_BCHW,
            signature=infer_signature(example_BCHW, logits_BK),
            registered_model_name=register_as,
            pip_requirements=[
                f"torch=={torch.__version__.split('+')[0]}",
                f"numpy=={np.__version__}",
            ],
        )
    version = str(info.registered_model_version)
    client.set_registered_model_alias(register_as, "champion", version)
    return LoggedModel(uri=info.model_uri, name=register_as, version=version)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a journal; a last line that was cut off by a crash is left out."""
    entries = []
    lines = path.read_text().split("\n")
    for number, line in enumerate(lines):
        try:
            entries += [json.loads(line)] if line else []
        except json.JSONDecodeError:
            if number < len(lines) - 1:
                raise TrackingError(
                    f"{path} line {number + 1} is damaged: delete the line"
                ) from None
    return entries
