"""Log MLflow runs and their curves during training.

Everything is first written to a journal on disk, from which a thread sends it: a slow or
unavailable server neither delays training nor loses data. Operations are idempotent, so nothing is
logged twice.

Shapes: B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import queue
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from raygkd.errors import StorageError, TrackingError
from raygkd.storage.atomic_files import Place, is_remote, local_copy, make_folder, place
from raygkd.storage.journal import open_journal
from raygkd.tracking.client import client_of
from raygkd.tracking.journal_entries import read_journal
from raygkd.tracking.logged_models import LoggedModel, log_model
from raygkd.tracking.model_registry import register
from raygkd.tracking.redaction import short_reason, shown, without_secrets
from raygkd.tracking.tags import PARENT_TAG, START_TAG

_TAG_LIMIT = 5000
_log = logging.getLogger(__name__)


def _may_pass(error: Exception) -> bool:
    """Return whether the request may succeed later: no answer, or an error of the server."""
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
    """Raise errors of the artifact store as rejections, so that they do not delay metrics."""
    try:
        yield
    except OSError as error:
        if getattr(error, "response", None) is not None:
            raise TrackingError(str(error)) from error
        raise


class Tracker:
    """Logs runs to one MLflow experiment, from the driver.

    The caller identifies runs by keys; the MLflow run id is known once the server answers. An
    existing journal is resumed: known keys continue their runs, and unsent operations are sent.
    What the server rejects is reported as a warning and stays in the journal.

    Args:
        uri: of the MLflow store or server, checked by ``connect``.
        experiment_id: from ``connect``.
        journal: path of the journal, with one JSON object per line.

    Attributes:
        uri: without user name and password.
        experiment_id, journal: as given.
    """

    def __init__(self, uri: str, experiment_id: str, journal: Place):
        self.uri = shown(uri)
        self.experiment_id = experiment_id
        self.journal = journal
        self._journal = open_journal(journal)
        self._secret_uri = uri
        self._client = client_of(uri)
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
        """Open a run, or resume the one that was open under this key.

        Args:
            key: the caller's key of the run.
            name: of the run in the UI.
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

        Values that are not finite are skipped, as are those that a resumed run reports again.
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
        """Upload a picture to a run; its path is kept relative, so that the run may be moved."""
        folder = f"{self.journal.parent}/"
        self._append("figure", key, path=str(path).removeprefix(folder))

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

        Returns None, with a warning, if that fails. A run logs its model once: a resumed process
        returns the version that an earlier one registered.

        Args:
            key: the run.
            model: a module of images (B, C, H, W) to logits (B, K), on the CPU; or the place of
                a detector's model file, which ``raygkd.deployed`` loads.
            example_BCHW: float32 images, for the signature and the schema of a served model.
            register_as: name of the registered model.
            description: of the version, as Markdown.
            tags: of the version, such as the scores that chose it.
        """
        if key in self._models:
            return self._models[key]
        run_id = self.run_id(key)
        try:
            if run_id is None:
                raise TrackingError("the run could not be created")
            logged = log_model(self._client, self.experiment_id, run_id, model, example_BCHW)
            version, alias = register(
                self._client, register_as, logged, self._strings(tags), description
            )
        except Exception as error:
            # whatever it is, it must not cost the training that came before
            reason = short_reason(error, self._secret_uri)
            _log.warning(
                "MLflow at %s did not receive the model of run '%s': %s", self.uri, key, reason
            )
            return None
        model_of_run = LoggedModel(
            uri=logged.model_uri, name=register_as, version=version, alias=alias
        )
        with self._lock:
            self._write({"key": key, "model": asdict(model_of_run)})
        return model_of_run

    def close(self, status: str = "FINISHED", timeout: float = 10.0) -> None:
        """End all open runs, then wait until everything is sent.

        Warns if the server does not accept everything within ``timeout`` seconds: the rest stays in
        the journal, and a Tracker on the same journal sends it. If the journal cannot be written,
        the ends of the runs are only sent to MLflow.
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
                "MLflow at %s has not received everything; the rest is kept in %s and is sent when "
                "this run is resumed",
                self.uri,
                self.journal,
            )

    # the journal

    def _take_up(self) -> None:
        """Resume from the journal of an earlier process, if there is one."""
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
        """Update the state with an operation in the journal."""
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
            name: without_secrets(str(value), self._secret_uri) for name, value in values.items()
        }

    # the thread

    def _send_all(self) -> None:
        while (operation := self._queue.get()) is not None:
            if not self._send(operation):
                return
        self._all_sent = True

    def _send(self, operation: dict[str, Any]) -> bool:
        """Send one operation until the server accepts or rejects it; False if closed before."""
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
        """Write to the journal that an operation was sent; if that fails, it is sent again."""
        try:
            with self._lock:
                self._write(entry)
        except StorageError as error:
            if not self._unwritable:
                self._unwritable = True
                _log.warning(
                    "everything logged to MLflow at %s is sent again when this run is resumed: %s",
                    self.uri,
                    error,
                )

    def _tell_outage(self, error: Exception) -> None:
        if not self._failing:
            self._failing = True
            _log.warning(
                "MLflow at %s does not answer (%s); training continues, and everything is kept in "
                "%s",
                self.uri,
                short_reason(error, self._secret_uri),
                self.journal,
            )

    def _tell_refusal(self, operation: dict[str, Any], error: Exception) -> None:
        """Warn once for each run and kind of operation, not for each epoch."""
        self._failing = False
        subject = operation["key"], operation["op"]
        if subject not in self._told:
            self._told.add(subject)
            _log.warning(
                "MLflow at %s rejects '%s' of run '%s' (%s); it is kept in %s",
                self.uri,
                operation["op"],
                operation["key"],
                short_reason(error, self._secret_uri),
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
        given = operation["path"]
        is_inside = not is_remote(given) and not os.path.isabs(given)
        picture = self.journal.parent / given if is_inside else place(given)
        with local_copy(picture) as path, _store_of_artifacts():
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
