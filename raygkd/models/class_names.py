"""Names of the classes that weights were trained for, and the places of the images' among them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from raygkd.errors import ConfigError, DataError, brief, near
from raygkd.models.checkpoints import read_contents
from raygkd.storage.atomic_files import place
from raygkd.storage.reading import MOST_SETTINGS_BYTES, parse_json, read_text

# where training scripts put the names in what they save
KEYS = ("class_names", "classes")
# what libraries call classes without a name
_NUMBERED = re.compile(r"(label|class)?[ _-]?\d+", re.IGNORECASE)


def read_class_names(path: str) -> tuple[str, ...]:
    """Return the names in a file: one per line, or a JSON list.

    Raises:
        DataError: it cannot be read, holds no names, or a name twice.
    """
    try:
        text = read_text(place(path), most=MOST_SETTINGS_BYTES)
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror or error}; pass a text file with one class name "
            "per line"
        ) from error
    if text.lstrip().startswith("["):
        try:
            names = parse_json(text)
        except ValueError as error:
            raise DataError(f"{path} is not a JSON list: {error}") from error
    else:
        names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"{path}: must contain one class name per line, or a JSON list of them")
    for name, times in Counter(names).items():
        if times > 1:
            raise DataError(f"{path}: {brief(name)} is given more than once")
    return tuple(names)


def class_names_in(path: str) -> tuple[str, ...]:
    """Return the class names that a weights file contains as well; () where it contains none.

    Raises:
        DataError: the file cannot be read.
    """
    contents = read_contents(path)
    if not isinstance(contents, Mapping):
        return ()
    return next((found for key in KEYS if (found := _as_names(contents.get(key)))), ())


def names_by_number(by_number: Mapping[Any, Any]) -> tuple[str, ...]:
    """Return the names of a mapping of class number -> name; () where they say no more than that.

    Args:
        by_number: such as ``id2label`` of a configuration of transformers; a key may be a text.
    """
    numbered = {int(number): name for number, name in by_number.items()}
    return _as_names([numbered.get(number) for number in range(len(numbered))])


def _as_names(found: Any) -> tuple[str, ...]:
    if not isinstance(found, list | tuple) or not all(isinstance(one, str) for one in found):
        return ()
    return () if all(_NUMBERED.fullmatch(name) for name in found) else tuple(found)


def class_places(names: Sequence[str], wanted: Sequence[str], of: str) -> tuple[int, ...]:
    """Return the place of each wanted class among names.

    Capitals, and "_" or "-" instead of a space, make no difference. A name may be several, with
    commas between them ("n01440764, tench, Tinca tinca"); one that two classes have counts for
    neither.

    Args:
        names: of the classes of weights, in the order of their logits.
        wanted: of the images, in the order of their labels.
        of: what errors call the names.

    Raises:
        ConfigError: a wanted class is none of them.
    """
    found: dict[str, set[int]] = {}
    for number, name in enumerate(names):
        for one in {name, *name.split(",")}:
            found.setdefault(_plain(one), set()).add(number)
    exact = {name: number for number, name in enumerate(names)}
    places = []
    for name in wanted:
        numbers = {exact[name]} if name in exact else found.get(_plain(name), set())
        if len(numbers) != 1:
            known = [one for one in found if one]
            problem = f"{len(numbers)} classes" if numbers else "none"
            raise ConfigError(
                f"{of} has {len(names)} classes, but {problem} named {name!r}, a class of "
                f"the images{near(_plain(name), known)}"
            )
        places.append(numbers.pop())
    if len(set(places)) < len(places):
        twice = next(names[one] for one in places if places.count(one) > 1)
        raise ConfigError(f"{of}: {twice!r} matches several classes of the images")
    return tuple(places)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()
