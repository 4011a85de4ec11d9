"""The types of settings, and how their values are parsed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import types
import typing
from dataclasses import dataclass
from typing import Any

from raygkd.errors import ConfigError, brief


@dataclass(frozen=True)
class WorkerRange:
    """The number of training processes of a run: as many as fit, within limits.

    Attributes:
        least: minimum number.
        most: maximum number.
    """

    least: int
    most: int

    @classmethod
    def parse(cls, value: Any) -> WorkerRange:
        """Parse a number (2) or a range ("1-4").

        Raises:
            ValueError: the value is neither.
        """
        least, dash, most = str(value).partition("-")
        return cls(int(least), int(most if dash else least))

    @property
    def is_elastic(self) -> bool:
        """Whether the number may change during a run."""
        return self.least < self.most

    @property
    def plain(self) -> int | str:
        """The value for YAML, which ``parse`` accepts."""
        return str(self) if self.is_elastic else self.least

    def __str__(self) -> str:
        return f"{self.least}-{self.most}" if self.least != self.most else str(self.least)


@dataclass(frozen=True, order=True)
class LevelPair:
    """A level of the student, and the level of the teacher with which it is matched.

    Attributes:
        student: counted from 1.
        teacher: counted from 1; None to choose it automatically.
    """

    student: int
    teacher: int | None = None

    @classmethod
    def parse(cls, value: Any) -> LevelPair:
        """Parse a number (2) or a pair ("2:1", student:teacher).

        Raises:
            ValueError: the value is neither.
        """
        if not isinstance(value, int | str) or isinstance(value, bool):
            raise ValueError(f"{value!r} is not a pair of levels")
        student, colon, teacher = str(value).partition(":")
        return cls(int(student), int(teacher) if colon else None)

    @property
    def plain(self) -> int | str:
        """The value for YAML, which ``parse`` accepts."""
        return self.student if self.teacher is None else str(self)

    def __str__(self) -> str:
        return str(self.student) if self.teacher is None else f"{self.student}:{self.teacher}"


_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def seconds_of(text: str) -> float | None:
    """Return a time such as 90s, 30m or 2h in seconds; None if it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
    return seconds or None


def flag(name: str) -> str:
    """Return the command-line option of a setting."""
    if "." in name:
        return f"--set {name}"
    return "--" + name.replace("_", "-")


def base_type(kind: Any) -> Any:
    """Return the type of a setting without None."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return next(option for option in options if option is not type(None))


def coerce(name: str, kind: Any, value: Any) -> Any:
    """Return ``value`` as the type of setting ``name``; ConfigError if the type is wrong."""
    if value is None and base_type(kind) is not kind:
        return None
    kind = base_type(kind)
    if kind is WorkerRange:
        with contextlib.suppress(ValueError):
            return value if isinstance(value, WorkerRange) else WorkerRange.parse(value)
        raise ConfigError(f"{flag(name)} {brief(value)}: must be a number, or a range such as 1-4")
    if kind is LevelPair:
        with contextlib.suppress(ValueError):
            return value if isinstance(value, LevelPair) else LevelPair.parse(value)
        raise ConfigError(
            f"{flag(name)} {brief(value)}: must be levels such as 1,2, or pairs student:teacher "
            "such as 1:2,2:4"
        )
    if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(coerce(name, typing.get_args(kind)[0], item) for item in value)
    if kind is float and isinstance(value, str):
        # YAML 1.1 reads 5e-4 as text
        with contextlib.suppress(ValueError):
            return float(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and is_number:
        with contextlib.suppress(OverflowError):
            return float(value)
        raise ConfigError(f"{flag(name)} {brief(value)}: must be a finite number")
    if (kind is int and is_number and isinstance(value, int)) or (
        kind in (bool, str) and isinstance(value, kind)
    ):
        return value
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
    lists = {
        int: "a list of whole numbers",
        float: "a list of numbers",
        str: "a list of strings",
        LevelPair: "a list of levels",
    }
    expected = names.get(kind) or lists[typing.get_args(kind)[0]]
    raise ConfigError(f"{flag(name)} {brief(value)}: must be {expected}")


def coerce_text(name: str, kind: Any, text: str) -> Any:
    """Parse the value of setting ``name`` on the command line; ConfigError as in ``coerce``."""
    base = base_type(kind)
    if text == "none" and base is not kind:
        return None
    if base is LevelPair:
        return coerce(name, kind, text)
    if typing.get_origin(base) is tuple:
        item = typing.get_args(base)[0]
        return tuple(coerce_text(name, item, part) for part in text.split(","))
    with contextlib.suppress(ValueError, KeyError):
        value = {"true": True, "false": False}[text] if base is bool else base(text)
        return coerce(name, kind, value)
    return coerce(name, kind, text)


def text_of(value: Any) -> str:
    """Return a value as it is written on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def plain(value: Any) -> Any:
    """Return a setting's value for YAML and JSON."""
    if isinstance(value, WorkerRange | LevelPair):
        return value.plain
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def fingerprint(values: Any) -> str:
    """Return 16 hexadecimal digits of a hash of JSON-compatible values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
