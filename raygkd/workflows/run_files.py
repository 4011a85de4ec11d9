"""The JSON files of a run, checked as they are read: its result, and what it depends on."""

from __future__ import annotations

from typing import Any

from raygkd.errors import DataError
from raygkd.storage.atomic_files import Place
from raygkd.storage.reading import check_type, parse_json, read_text

Number = float | None
# the model of a row of a result
MODEL_ROW = {"model": str, "parameters": int, "test_score": Number}
TRIAL = {
    "number": int,
    "params": dict[str, Any],
    "status": str,
    "error": str | None,
    "val_score?": Number,
}
_SPREAD = {"mean": Number, "std": Number}
_REPEAT = {"seeds": list[int], "models": dict[str, dict[str, Any]], "best_minus": dict[str, Any]}
_COMPARISON = {"metric": str, "seeds": list[int], "methods": list[dict[str, Any]]}
# what is read of a result; earlier versions wrote less
RESULT_SHAPE = {
    "seconds": float,
    "run?": str,
    "mlflow": {"tracking_uri": str, "run_id?": str | None, "parent_run_id?": str | None},
    "models?": dict[str, dict[str, Any]],
    "teacher?": {"path?": str | None, "test_score?": Number},
    "best?": MODEL_ROW,
    "student_alone?": MODEL_ROW,
    "selection?": {"number?": int},
    "trials?": list[dict[str, Any]],
    "trainings?": list[dict[str, Any]],
    "students?": list[dict[str, Any]] | None,
    "verdict?": dict[str, Any] | None,
    "champion?": dict[str, Any] | None,
    "repeat?": dict[str, Any] | None,
    "comparison?": dict[str, Any],
}
# of facts: what a report reads
FACTS_SHAPE = {"data set, classes?": list[str]}


def read_json(path: Place) -> dict[str, Any]:
    """Return the mapping in a JSON file that a run has written.

    Raises:
        DataError: it cannot be read, or is damaged.
        StorageError: the object store fails.
    """
    try:
        found = parse_json(read_text(path))
        if not isinstance(found, dict):
            raise ValueError("it must contain keys and values")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); restore it from a copy") from error
    return found


def read_result(path: Place) -> dict[str, Any]:
    """Return a run's result.

    Raises:
        DataError: it cannot be read, is damaged, or is not of the form that runs write.
        StorageError: the object store fails.
    """
    found = read_json(path)
    try:
        check_type(found, RESULT_SHAPE)
        for name in ("trials", "trainings"):
            for number, row in enumerate(found.get(name, ())):
                check_type(row, TRIAL, f"{name}.{number}")
        _check_rows(found.get("models", {}), MODEL_ROW, "models")
        _check_optional(found, "repeat", _REPEAT)
        _check_optional(found, "comparison", _COMPARISON)
        _check_optional(found, "verdict", {"line": str})
        repeat, comparison = found.get("repeat") or {}, found.get("comparison") or {}
        _check_rows(
            repeat.get("models", {}), {**_SPREAD, "test_scores": list[Number]}, "repeat.models"
        )
        _check_rows(repeat.get("best_minus", {}), _SPREAD, "repeat.best_minus")
        rows = dict(enumerate(comparison.get("methods", ())))
        shape: dict[str, Any] = {
            "method": str,
            **_SPREAD,
            "scores": list[Number] | dict[str, Number],
        }
        _check_rows(rows, shape, "comparison.methods")
        rows = dict(enumerate(found.get("students") or ()))
        shape = {"student": str, "val_score": Number, "front": bool, "costs": dict[str, Number]}
        _check_rows(rows, shape, "students")
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}; restore it from a copy") from error
    return found


def read_facts(path: Place) -> dict[str, Any]:
    """Return the facts that a run depends on; DataError as ``read_result``."""
    found = read_json(path)
    try:
        check_type(found, FACTS_SHAPE)
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}; restore it from a copy") from error
    return found


def _check_rows(rows: Any, shape: Any, at: str) -> None:
    for name, row in rows.items():
        check_type(row, shape, f"{at}.{name}")


def _check_optional(found: dict[str, Any], name: str, shape: Any) -> None:
    if found.get(name) is not None:
        check_type(found[name], shape, name)
