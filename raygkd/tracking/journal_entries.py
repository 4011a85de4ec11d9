"""The entries of a tracker's journal: operations for MLflow, and what came of them."""

from __future__ import annotations

from typing import Any

from raygkd.errors import DataError
from raygkd.storage.atomic_files import Place
from raygkd.storage.journal import read_entries
from raygkd.storage.reading import check_type

# what each kind of operation has besides its key, number and time
OPERATIONS: dict[str, dict[str, Any]] = {
    "start": {
        "name": str | None,
        "parent": str | None,
        "token": str,
        "params": dict[str, str],
        "tags": dict[str, str],
    },
    "text": {"file": str, "text": str},
    "metrics": {"step": int, "values": dict[str, float]},
    "tags": {"tags": dict[str, str]},
    "figure": {"path": str},
    "end": {"status": str},
}
_REMEDY = "delete the line"
_MODEL = {
    "key": str,
    "model": {"uri": str, "name": str, "version": str, "alias": str},
}


def read_journal(path: Place) -> list[dict[str, Any]]:
    """Return the entries of a journal; empty if there is none.

    Raises:
        DataError: a line other than the last is damaged.
    """
    entries = read_entries(path, dict[str, Any], remedy=_REMEDY)
    for number, entry in enumerate(entries, start=1):
        try:
            check_type(entry, _shape(entry))
        except ValueError as error:
            raise DataError(f"{path} line {number} is damaged ({error}); {_REMEDY}") from error
    return entries


def _shape(entry: dict[str, Any]) -> dict[str, Any]:
    """Return what an entry has, by its kind."""
    if "sent" in entry:
        return {"sent": int}
    if "run_id" in entry:
        return {"key": str, "run_id": str}
    if "model" in entry:
        return _MODEL
    op = entry.get("op")
    if not isinstance(op, str):
        raise ValueError("neither an operation nor the result of one")
    # an unknown one is reported when it is sent
    return {"key": str, "sequence": int, **OPERATIONS.get(op, {})}
