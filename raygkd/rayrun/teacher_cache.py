"""Cache of the teacher's outputs for the training images, in the object store.

An actor owns the entries, so that they outlive the trial that computed them. Trials fetch the
entries once per epoch, look up rows themselves, and send the outputs that they had to compute.
Failures only cost compute: a trial that loses the cache continues without it.

Shapes: B batch, N rows of an entry.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray import ObjectRef
from ray.exceptions import RayError
from torch import Tensor

from raygkd.config import LevelPair
from raygkd.data.views import UNCHANGED, Views

Rows = NDArray[np.int64]


class Key(NamedTuple):
    """What the outputs for a row depend on besides the row.

    Attributes:
        teacher: name.
        augment: kind of the training transform.
        seed, epoch: of the augmentation; 0 where all have the same images.
        views: changes of the images after their crop.
        batch: images of a batch. One of another size is rounded in another way, and a trial's
            results would depend on which other trials came before.
    """

    teacher: str
    augment: str
    seed: int
    epoch: int
    views: Views
    batch: int


# a directory is small; an actor that does not return it by then counts as lost
REPLY_SECONDS = 60.0
# messages to the actor that wait at a time: each holds a batch
MOST_WAITING = 8

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The cached outputs of one batch.

    Attributes:
        rows: name of a part -> its rows (N,).
        dtypes: name of a part -> torch dtype of its arrays.
        parts: reference to name -> array (N, ...).
    """

    rows: dict[str, Rows]
    dtypes: dict[str, torch.dtype]
    parts: ObjectRef


class Keeper:
    """The actor: accepts entries in order until one does not fit, and none after that.

    Args:
        limit: maximum bytes.
    """

    def __init__(self, limit: int):
        self._limit, self._bytes, self._full = limit, 0, False
        self._entries: dict[Key, list[Entry]] = {}
        self._rows: dict[tuple[Key, str], set[int]] = {}

    def add(
        self,
        key: Key,
        rows: dict[str, Rows],
        dtypes: dict[str, torch.dtype],
        parts: dict[str, NDArray],
    ) -> None:
        """Store an entry, without the parts whose rows are all cached."""
        fresh = {
            name: part
            for name, part in parts.items()
            if not self._rows.get((key, name), set()).issuperset(rows[name].tolist())
        }
        size = sum(part.nbytes + rows[name].nbytes for name, part in fresh.items())
        self._full = self._full or self._bytes + size > self._limit
        if self._full or not fresh:
            return
        entry = Entry(
            rows={name: rows[name] for name in fresh},
            dtypes={name: dtypes[name] for name in fresh},
            parts=ray.put(fresh),
        )
        self._bytes += size
        self._entries.setdefault(key, []).append(entry)
        for name in fresh:
            self._rows.setdefault((key, name), set()).update(rows[name].tolist())

    def directory(self, key: Key) -> tuple[list[Entry], bool]:
        """Return the entries under a key, and whether the cache is full."""
        return self._entries.get(key, []), self._full

    def held(self) -> int:
        """Return the bytes of all entries."""
        return self._bytes


@dataclass(frozen=True)
class TeacherCache:
    """The part of the cache that is sent to trials.

    Attributes:
        keeper: handle of the actor.
        levels: levels whose maps are cached, whichever a trial matches; None for all.
    """

    keeper: Any
    levels: tuple[LevelPair, ...] | None

    def open(
        self,
        *,
        seed: int,
        repeats: bool,
        views: Views = UNCHANGED,
        teacher: str = "",
        augment: str = "",
    ) -> CachedTeacher:
        """Return the access of one rank.

        Args:
            teacher: its name, where there are several.
            augment: kind of the training transform, where there are several.
            seed: of the augmentation.
            views: changes of the images after their crop.
            repeats: there is no augmentation, so all epochs have the same images.
        """
        key = Key(teacher, augment, 0 if repeats else seed, 0, views, 0)
        return CachedTeacher(self.keeper, self.levels, key, repeats=repeats)


def start_cache(limit: int, levels: tuple[LevelPair, ...] | None) -> TeacherCache:
    """Return a cache of ``limit`` bytes, which exists until its last handle is gone."""
    return TeacherCache(ray.remote(num_cpus=0)(Keeper).remote(limit), levels)


class CachedTeacher:
    """One rank's access to the cache (the ``TeacherStore`` of the training loop).

    Args:
        keeper: handle of the actor.
        levels: see ``TeacherCache``.
        key: of all batches, but for epoch and batch size.
        repeats: there is no augmentation, so the outputs of one epoch hold for all.
    """

    def __init__(
        self,
        keeper: Any,
        levels: tuple[LevelPair, ...] | None,
        key: Key,
        *,
        repeats: bool,
    ):
        self.levels = levels
        self._keeper, self._own_key, self._repeats = keeper, key, repeats
        self._epoch: int | None = None
        self._directory = _Directory([])
        self._full = False
        self._waiting: list[ObjectRef] = []

    def get(self, epoch: int, rows_B: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """Return those parts (B, ...) that are known of every row; the first call of an epoch asks
        the actor.
        """
        if self._keeper is None:
            return {}
        try:
            if epoch != self._epoch:
                self._epoch = epoch
                asked = self._keeper.directory.remote(self._key(epoch, rows_B))
                entries, self._full = ray.get(asked, timeout=REPLY_SECONDS)
                self._directory = _Directory(entries)
            return self._directory.take(rows_B.numpy(), names)
        except RayError as error:
            self._give_up(error)
            return {}

    def add(self, epoch: int, rows_B: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Send outputs that are not cached, waiting at most for the previous ones."""
        if self._keeper is None or self._full:
            return
        rows_by_name, arrays = {}, {}
        for name, part in parts.items():
            new_B = self._directory.note(rows_B.numpy(), name)
            if new_B.any():
                rows_by_name[name] = rows_B.numpy()[new_B]
                arrays[name] = _to_numpy(part)[new_B]
        if not arrays:
            return
        dtypes = {name: parts[name].dtype for name in arrays}
        try:
            sent = self._keeper.add.remote(self._key(epoch, rows_B), rows_by_name, dtypes, arrays)
            self._waiting.append(sent)
            if len(self._waiting) > MOST_WAITING:
                _, self._waiting = ray.wait(self._waiting)
        except RayError as error:
            self._give_up(error)

    def _key(self, epoch: int, rows_B: Tensor) -> Key:
        return self._own_key._replace(epoch=0 if self._repeats else epoch, batch=len(rows_B))

    def _give_up(self, error: RayError) -> None:
        reason = " ".join(str(error).split())[:200]
        _log.warning(
            f"the teacher cache is lost; the teacher's outputs are computed again: {reason}"
        )
        self._keeper, self._directory = None, _Directory([])


class _Directory:
    """Finds rows in the entries of an epoch, and reads each entry once."""

    def __init__(self, entries: list[Entry]):
        self._entries = entries
        self._parts: dict[int, dict[str, NDArray]] = {}
        # name -> rows in ascending order, the number of the entry of each, its place in that entry
        self._places: dict[str, tuple[Rows, Rows, Rows]] = {}
        self._sent: dict[str, set[int]] = {}

    def take(self, rows: Rows, names: Collection[str]) -> dict[str, Tensor]:
        """Return the parts that are cached for all rows, each (B, ...)."""
        found = {name: self._find(rows, name) for name in names}
        whole = {name: place for name, place in found.items() if (place[0] >= 0).all()}
        self._read({number for entries, _ in whole.values() for number in entries.tolist()})
        return {name: self._gather(name, *place) for name, place in whole.items()}

    def note(self, rows: Rows, name: str) -> NDArray[np.bool_]:
        """Return which rows of a part were neither cached nor marked before (B,), and mark them."""
        sent = self._sent.setdefault(name, set())
        known = self._find(rows, name)[0] >= 0
        new = ~known & np.array([row not in sent for row in rows.tolist()])
        sent.update(rows.tolist())
        return new

    def _find(self, rows: Rows, name: str) -> tuple[Rows, Rows]:
        """Return entry and position of each row; the entry is -1 if it is not cached."""
        if name not in self._places:
            self._places[name] = self._index(name)
        ordered, entries, places = self._places[name]
        if len(ordered) == 0:
            return np.full(len(rows), -1), np.zeros(len(rows), np.int64)
        index = np.searchsorted(ordered, rows).clip(max=len(ordered) - 1)
        return np.where(ordered[index] == rows, entries[index], -1), places[index]

    def _index(self, name: str) -> tuple[Rows, Rows, Rows]:
        having = [(n, e.rows[name]) for n, e in enumerate(self._entries) if name in e.rows]
        if not having:
            return (np.zeros(0, np.int64),) * 3
        rows = np.concatenate([part for _, part in having])
        entries = np.concatenate([np.full(len(part), number) for number, part in having])
        places = np.concatenate([np.arange(len(part)) for _, part in having])
        order = np.argsort(rows, kind="stable")
        return rows[order], entries[order], places[order]

    def _read(self, numbers: set[int]) -> None:
        missing = sorted(numbers - self._parts.keys())
        references = [self._entries[number].parts for number in missing]
        read = ray.get(references, timeout=REPLY_SECONDS)
        self._parts |= zip(missing, read, strict=True)

    def _gather(self, name: str, entries: Rows, places: Rows) -> Tensor:
        first = self._parts[int(entries[0])][name]
        gathered = np.empty((len(entries), *first.shape[1:]), first.dtype)
        for number in np.unique(entries).tolist():
            here = entries == number
            gathered[here] = self._parts[number][name][places[here]]
        return torch.from_numpy(gathered).view(self._entries[int(entries[0])].dtypes[name])


def _to_numpy(part: Tensor) -> NDArray:
    """Return a tensor's values, those of bfloat16 as int16 of the same bits."""
    part = part.cpu()
    return (part.view(torch.int16) if part.dtype == torch.bfloat16 else part).numpy()
