"""A store that was moved, copied or restored with its output folder: its places move along.

MLflow keeps absolute places of artifacts, and offers no call that changes them.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from pathlib import Path
from urllib.parse import unquote, urlsplit

from raygkd.errors import TrackingError
from raygkd.tracking.tags import FOLDER_TAG

STORE, ARTIFACTS = "mlflow.db", "mlartifacts"
# tables and columns with places of artifacts
_PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
_log = logging.getLogger(__name__)


def move_places_along(path: Path) -> None:
    """Point a store to the artifacts and runs beside it, if its output folder was moved.

    Where it was made is known by the artifacts of MLflow's own experiment. A store whose artifacts
    are elsewhere on purpose (``--tracking-uri`` of one folder with ``--output`` of another) stays
    as it is.

    Args:
        path: of the SQLite file, which need not exist.

    Raises:
        TrackingError: the store cannot be read or written.
    """
    if path.name != STORE or not path.exists() or not path.stat().st_size:
        return
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=30.0)) as store:
            old, new = _home(store), path.parent
            if old is None or old == new or not _is_moved(old, new):
                return
            # of two commands at once, the second finds it done
            store.execute("BEGIN IMMEDIATE")
            if _home(store) == old:
                count = _replace(store, old, new)
                _log.warning(
                    "the output folder was moved or copied from %s: %d places in its MLflow store "
                    "are now in %s",
                    *(old, count, new),
                )
            store.commit()
    except sqlite3.Error as error:
        raise TrackingError(f"MLflow's store {path} cannot be used: {error}") from error


def _home(store: sqlite3.Connection) -> Path | None:
    """Return the output folder that a store was made in; None if it was made in another way."""
    try:
        row = store.execute(
            "SELECT artifact_location FROM experiments WHERE experiment_id = 0"
        ).fetchone()
    except sqlite3.OperationalError:  # it has no tables yet
        return None
    place = urlsplit(row[0] if row else "")
    artifacts = Path(unquote(place.path)).parent
    return artifacts.parent if place.scheme == "file" and artifacts.name == ARTIFACTS else None


def _is_moved(old: Path, new: Path) -> bool:
    """Return whether the store came here with its artifacts."""
    if not old.exists():
        return True
    is_copy, has_left = (old / STORE).exists(), not (old / ARTIFACTS).exists()
    return (new / ARTIFACTS).exists() and (is_copy or has_left)


def _replace(store: sqlite3.Connection, old: Path, new: Path) -> int:
    """Replace the old folder in all places; return their number."""
    count = 0
    for table, column in _PLACES:
        count += _replace_start(store, table, column, old.as_uri(), new.as_uri())
    of_folders = f"AND key = '{FOLDER_TAG}'"
    return count + _replace_start(store, "tags", "value", str(old), str(new), of_folders)


def _replace_start(
    store: sqlite3.Connection, table: str, column: str, old: str, new: str, condition: str = ""
) -> int:
    return store.execute(
        f"UPDATE {table} SET {column} = ? || substr({column}, ?)"
        f" WHERE substr({column}, 1, ?) = ? {condition}",
        (f"{new}/", len(old) + 2, len(old) + 1, f"{old}/"),
    ).rowcount
