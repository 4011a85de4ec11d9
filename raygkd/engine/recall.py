"""What the teacher said before of the same training images, so that it need not say it again.

Shapes: B batch, C channels, H height, W width, K classes, P side of a square matrix.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

import torch
from torch import Tensor

from raygkd.config import LevelPair
from raygkd.engine.distributed import all_sum
from raygkd.engine.objective import Objective, Teacher, TeacherOutput
from raygkd.losses import TeacherGraph


class TeacherStore(Protocol):
    """Keeps parts of what a teacher says, by epoch, row and name, for runs of the same models."""

    @property
    def levels(self) -> tuple[LevelPair, ...] | None:
        """Levels that other runs may want besides this one's; None for all that can be matched."""

    def known(self, epoch: int, rows_B: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """Return those parts (B, ...) that are known of every row, on the CPU."""

    def add(self, epoch: int, rows_B: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Take parts (B, ...) of rows just asked for, on any device; they may be kept or not."""


class Recall:
    """Asks a store first, and the teacher for what the store does not know of a whole batch.

    What is kept holds for any temperature, dimension and weight of the terms: logits, feature maps
    as the teacher gives them, and the spectra of its graphs. Maps cost a forward pass, and spectra
    even more for their size; masks and adjacency are cheaper to work out again than to hold.

    Args:
        teacher: it may know more levels than the objective reads; all of them are kept.
        store: where to look, and what to tell.
        objective: of the run; it says what is wanted.
    """

    def __init__(self, teacher: Teacher, store: TeacherStore, objective: Objective):
        self.teacher, self._store, self._graph = teacher, store, objective.graph
        self._baseline_levels = objective.baseline_levels
        self._logits = ["logits"] if objective.reads_logits else []
        self._asked = self._recalled = 0

    def __call__(self, epoch: int, rows_B: Tensor, images_BCHW: Tensor) -> TeacherOutput:
        """Return what the teacher says of the images of rows, which it sees if it must."""
        graph = self._graph
        levels = list(graph.student_shapes) if graph is not None else []
        said = [*self._logits, *map(self._map, levels or self._baseline_levels)]
        spectra = [name for level in levels for name in self._spectrum(level)]
        found = self._store.known(epoch, rows_B, [*said, *spectra])
        parts = {name: part.to(images_BCHW.device) for name, part in found.items()}
        new: dict[str, Tensor] = {}
        self._asked += 1
        self._recalled += parts.keys() >= set(said)
        if not parts.keys() >= set(said):
            new = self._ask(images_BCHW)
            parts |= new
        graphs: dict[int, TeacherGraph] = {}
        for level in levels:
            assert graph is not None
            names = self._spectrum(level)
            known = [parts[name] for name in names if name in parts]
            pairs = (known[0], known[1]) if len(known) == 2 else None
            graphs[level] = graph.teacher_graph(level, parts[self._map(level)], pairs)
            if names and pairs is None:
                graphs[level] = graph.with_spectrum(graphs[level])
                new |= zip(names, graphs[level].spectrum or (), strict=True)
        self._store.add(epoch, rows_B, new)
        maps = {level: parts[self._map(level)] for level in self._baseline_levels}
        return TeacherOutput(graphs or maps, parts.get("logits"))

    def _ask(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        output = self.teacher(images_BCHW)
        parts = {
            self._map(level): part
            for level, part in output.features.items()
            if isinstance(part, Tensor)
        }
        if self._logits:
            assert output.logits_BK is not None
            parts["logits"] = output.logits_BK
        return parts

    def _map(self, level: int) -> str:
        """Return the name of the map that a level of the student is matched with."""
        return f"map {self.teacher.pairs[level]}"

    def _spectrum(self, level: int) -> tuple[str, ...]:
        """Return the names of a level's eigenvalues and basis; none where they are not wanted."""
        graph = self._graph
        if graph is None or not graph.takes_spectra:
            return ()
        kind = f"{self.teacher.pairs[level]} {graph.weights}{' centred' if graph.centre else ''}"
        return f"eigenvalues {kind}", f"basis {kind}"

    def share(self, device: torch.device) -> float:
        """Return in how many of the batches since the last call the teacher was not asked, 0 to 1.

        It is equal on every rank; every rank must call. Without a batch it is 0.
        """
        recalled, asked = all_sum(
            torch.tensor([self._recalled, self._asked], dtype=torch.float64, device=device)
        ).tolist()
        self._asked = self._recalled = 0
        return recalled / max(asked, 1.0)
