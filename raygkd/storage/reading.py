"""Files from outside: their bytes, text, YAML and JSON, within limits.

What is read here ends: the file is a regular one and not too large, YAML and JSON are nested only
so deep, and YAML's aliases do not multiply its values. The readers raise OSError, whose
``strerror`` says what is wrong with the file; the parsers raise ValueError with one line.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from raygkd.errors import brief
from raygkd.storage.atomic_files import Place, require_regular

MIB = 1 << 20
# settings and other texts that people write by hand
MOST_SETTINGS_BYTES = 4 * MIB
# texts that programs write, such as annotations and journals
MOST_TEXT_BYTES = 2048 * MIB
# brackets inside brackets
DEEPEST = 50
# values of a YAML file, counted once for each alias
MOST_VALUES = 1_000_000


def read_bytes(path: Place, *, most: int = MOST_TEXT_BYTES) -> bytes:
    """Return the contents of a file.

    Args:
        path: of the file.
        most: bytes that it may have.

    Raises:
        OSError: it cannot be read, is not a regular file, or is larger.
        StorageError: the object store fails.
    """
    if not isinstance(path, Path):
        return path.read_bytes()
    require_regular(path)
    with path.open("rb") as file:
        # a file of /proc has no size and may have no end
        content = file.read(min(os.fstat(file.fileno()).st_size or most, most) + 1)
        while len(content) <= most and (more := file.read(MIB)):
            content += more
    if len(content) > most:
        raise OSError(errno.EFBIG, f"larger than {most // MIB} MiB", str(path))
    return content


def read_text(path: Place, *, most: int = MOST_TEXT_BYTES) -> str:
    """Return the contents of a UTF-8 file, without a byte order mark.

    Raises:
        OSError: as ``read_bytes``, or it is not UTF-8.
        StorageError: the object store fails.
    """
    return decode_text(read_bytes(path, most=most), path)


def decode_text(content: bytes, path: Place) -> str:
    """Return bytes of a file as text; OSError if they are not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise OSError(errno.EILSEQ, f"not UTF-8 text (line {line})", str(path)) from error


def parse_json(text: str | bytes, *, deepest: int = DEEPEST) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or names a key twice.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_repeats)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    _check_extent(value, deepest)
    return value


def parse_yaml(text: str | bytes) -> Any:
    """Return the value of a YAML text, of plain types; 1:2 is a text, not a number to base 60.

    Raises:
        ValueError: it is not YAML, is nested too deeply, names a key twice, or has aliases that
            hold themselves or multiply its values.
    """
    import yaml

    try:
        value = yaml.load(text, _yaml_loader())
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise ValueError(at + _one_line(error.problem or error)) from error
    # impossible dates and numbers raise what their types raise
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(_one_line(error)) from error
    _check_extent(value, DEEPEST)
    return value


def check_type(value: Any, kind: Any, at: str = "") -> None:
    """Check the type of a parsed value.

    Args:
        value: of plain types; whole numbers serve as fractions, but no other type as another.
        kind: a type such as ``dict[str, float]``, or a mapping of keys to kinds, in which "key?"
            need not be there; other keys are ignored.
        at: where in its file the value is, for messages.

    Raises:
        ValueError: names the first place that is of another type.
    """
    if not isinstance(kind, Mapping):
        _check_plain(value, kind, at)
        return
    _check_plain(value, dict, at)
    for name, inner in kind.items():
        key, here = name.removesuffix("?"), f"{at}.{name.removesuffix('?')}".lstrip(".")
        if key in value:
            check_type(value[key], inner, here)
        elif key == name:
            raise ValueError(f"{here} is missing")


def _check_plain(value: Any, kind: Any, at: str) -> None:
    import pydantic

    try:
        _adapter(kind).validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        inner = ".".join(brief(part, quoted=False) for part in first["loc"])
        place = ".".join(filter(None, (at, inner))) or "the value"
        expected = _one_line(first["msg"].removeprefix("Input ").replace("should be", "must be"))
        raise ValueError(f"{place} {expected}, not {brief(first['input'])}") from None


@functools.cache
def _adapter(kind: Any) -> Any:
    import pydantic

    return pydantic.TypeAdapter(kind, config=pydantic.ConfigDict(arbitrary_types_allowed=True))


def _without_repeats(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {brief(name)} is there twice")
        found[name] = value
    return found


def _check_extent(value: Any, deepest: int) -> None:
    """Refuse values that are nested too deeply, hold themselves, or are too many."""
    counted: dict[int, int] = {}

    def count(part: Any, depth: int) -> int:
        if not isinstance(part, dict | list | set | tuple):
            return 1
        if depth > deepest:
            raise ValueError(f"nested more than {deepest} deep, or a value that holds itself")
        if id(part) not in counted:
            inner = part.values() if isinstance(part, dict) else part
            counted[id(part)] = 1 + sum(count(one, depth + 1) for one in inner)
        if counted[id(part)] > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES:,} values, counted for each alias")
        return counted[id(part)]

    count(value, 1)


@functools.cache
def _yaml_loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def __init__(self, stream: Any):
            super().__init__(stream)
            self._checked: set[int] = set()

        def flatten_mapping(self, node: Any) -> None:
            # once: afterwards it has the keys of the mappings that it merges, too
            if id(node) not in self._checked:
                self._checked.add(id(node))
                _refuse_repeats(key for key, _ in node.value)
            super().flatten_mapping(node)

    pair = ("tag:yaml.org,2002:str", re.compile(r"[0-9]+:[0-9]+"))
    Loader.yaml_implicit_resolvers = {
        first: [pair, *known] if first in "0123456789" and first else known
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return Loader


def _refuse_repeats(keys: Iterable[Any]) -> None:
    import yaml

    seen: set[tuple[str, str]] = set()
    for key in keys:
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in seen:
                problem = f"the key {brief(key.value)} is there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add((key.tag, key.value))


def _one_line(text: object) -> str:
    return brief(" ".join(str(text).split()), quoted=False)
