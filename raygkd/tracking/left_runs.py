"""MLflow runs that killed processes left open."""

from __future__ import annotations

import logging

from raygkd.errors import ConfigError, StorageError
from raygkd.storage.atomic_files import place
from raygkd.storage.ownership import is_abandoned
from raygkd.tracking.client import client_of
from raygkd.tracking.redaction import short_reason
from raygkd.tracking.tags import FOLDER_TAG

_log = logging.getLogger(__name__)


def close_left_runs(uri: str, experiment_id: str) -> int:
    """End runs as KILLED that are open although their process has ended; return their number.

    They are open again once they are resumed. Runs whose folder cannot be read from this machine
    stay as they are.

    Args:
        uri: of the store or server.
        experiment_id: of the experiment.
    """
    client = client_of(uri)
    closed = 0
    try:
        found = client.search_runs([experiment_id], "attributes.status = 'RUNNING'")
        folders = {run.info.run_id: run.data.tags.get(FOLDER_TAG) for run in found}
        left = {folder for folder in {*folders.values()} if folder and _is_left(folder)}
        for run_id, folder in folders.items():
            if folder in left:
                client.set_terminated(run_id, "KILLED")
                closed += 1
    except Exception as error:
        # it must not keep a run from its start
        _log.warning("runs that were killed stay open in MLflow: %s", short_reason(error, uri))
    if closed:
        _log.warning("closed %d MLflow runs that killed processes had left open", closed)
    return closed


def _is_left(folder: str) -> bool:
    try:
        return is_abandoned(place(folder))
    except (ConfigError, StorageError, OSError):
        return False
