"""The faults of a data set: counted by kind, or refused in strict mode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from enum import Enum

from raygkd.errors import DataError


class Fault(Enum):
    """A kind of fault: how it is handled, and its name in messages; {of} is a suffix or split."""

    NO_FILE = "dropped", "image", "whose file is missing"
    NO_ANNOTATION = "dropped", "image", "without a readable annotation"
    NO_LABEL_FILE = "kept", "image", "without a label file, taken to have no objects"
    REPEATED = "dropped", "image", "listed more than once"
    LEAKED = "kept", "image", "also present in another split"
    COPIED = "kept", "image", "with a copy that may land in another split ({of} cut from train)"
    WRONG_SIZE = "ignored", "image size", "different from the file's"
    UNLISTED = "skipped", "image", "not listed in any annotation"
    OTHER_FILE = "skipped", "file", "with the suffix {of}"
    OTHER_FOLDER = "skipped", "folder", "next to the splits"
    SAME_CLASS = "merged", "class", "with the same name as another"
    SIMILAR_CLASS = "kept", "class", "whose name differs from another's only by case or spaces"
    SPLIT_CLASS = "kept", "class", "with the name of a split"
    SMALL_CLASS = "kept", "class", "with a single image"
    UNSEEN_CLASS = "kept", "class", "with no images in the {of} split"
    UNKNOWN_IMAGE = "dropped", "box", "of an unknown image"
    UNKNOWN_CLASS = "dropped", "box", "of an unknown class"
    NOT_FINITE = "dropped", "box", "without four finite numbers"
    NO_AREA = "dropped", "box", "with no area"
    OUTSIDE = "dropped", "box", "outside the image"
    BEYOND = "clipped", "box", "partly outside the image"
    UNIT = "kept", "set", "of boxes with implausible coordinates"

    @property
    def action(self) -> str:
        """How it is handled if annotations are not strict."""
        return self.value[0]

    def describe(self, count: int, of: str = "") -> str:
        """Return "box with no area" for one, "boxes with no area" for more."""
        _, noun, fault = self.value
        plural = ("es" if noun[-1] in "sx" else "s") if count > 1 else ""
        return f"{noun}{plural} {fault.format(of=of)}"


class Faults:
    """Counts the faults of a data set by kind, or raises at the first one.

    Args:
        strict: whether to raise.
    """

    def __init__(self, strict: bool):
        self.strict = strict
        self._counts: Counter[tuple[Fault, str]] = Counter()
        self._first: dict[tuple[Fault, str], str] = {}

    def add(self, fault: Fault, where: str, detail: str = "", *, of: str = "") -> None:
        """Count a fault.

        Args:
            fault: its kind.
            where: the file and the position in it.
            detail: the faulty value.
            of: a suffix or split; faults of one kind are counted for each.

        Raises:
            DataError: in strict mode.
        """
        suffix = f" ({detail})" if detail else ""
        if self.strict:
            raise DataError(
                f"{where}: {fault.describe(1, of)}{suffix}; correct it, or omit --strict to have "
                f"it {fault.action}"
            )
        self._counts[fault, of] += 1
        self._first.setdefault((fault, of), where + suffix)

    def count(self, *kinds: Fault) -> int:
        """Return the number of faults of some kinds."""
        return sum(count for (fault, _), count in self._counts.items() if fault in kinds)

    def warnings(self) -> tuple[str, ...]:
        """Return a line per kind of fault: how it was handled, how often, and where first."""
        return tuple(
            f"{'found' if fault.action == 'kept' else fault.action} {count:,} "
            f"{fault.describe(count, of)}, first in {self._first[fault, of]}"
            for (fault, of), count in self._counts.items()
        )


def report_class_names(names: Iterable[str], where: str, faults: Faults) -> None:
    """Report class names that are equal, or that differ only by case or spaces."""
    seen: dict[str, str] = {}
    for name in names:
        plain = "".join(name.split()).casefold()
        other = seen.setdefault(plain, name)
        if other is not name:
            fault = Fault.SAME_CLASS if other == name else Fault.SIMILAR_CLASS
            faults.add(fault, where, f"{name!r} and {other!r}" if other != name else repr(name))
