"""Labels as text: their order, and refusal of data with several labels or with measurements."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from raygkd.errors import DataError

SUPPORTED = "only one class per image is supported"
# characters that separate several labels of an image
SEPARATORS = re.compile(r"[|;,]")


def ordered_classes(labels: Iterable[str]) -> list[str]:
    """Return the distinct labels: by value if all are whole numbers, else by name."""
    names = set(labels)
    are_numbers = all(name.isdecimal() for name in names)
    return sorted(names, key=lambda name: (int(name), name)) if are_numbers else sorted(names)


def check_single_labels(labels: Sequence[str], where: str) -> None:
    """Check that labels are names of classes.

    Args:
        labels: label of each image.
        where: file, for error messages.

    Raises:
        DataError: labels are measurements (regression), or lists of labels (multi-label).
    """
    measured = next((label for label in labels if _is_fraction(label)), None)
    if measured is not None and all(map(_is_number, labels)):
        raise DataError(
            f"'{where}': labels are numbers such as {measured} (regression data); {SUPPORTED}"
        )
    joined = [label for label in set(labels) if SEPARATORS.search(label)]
    parts = [part.strip() for label in joined for part in SEPARATORS.split(label)]
    if joined and all(parts) and (set(parts) & set(labels) or len(set(parts)) < len(parts)):
        raise DataError(
            f"'{where}': labels such as {joined[0]!r} name several classes (multi-label data); "
            f"{SUPPORTED}"
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_fraction(text: str) -> bool:
    return _is_number(text) and not float(text).is_integer()
