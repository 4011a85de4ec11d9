"""Cached outputs of the teacher for the training images, computed where they are missing.

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
    """Stores outputs of a teacher by epoch, row and name, for runs of the same models."""

    @property
    def levels(self) -> tuple[LevelPair, ...] | None:
        """Levels that other runs may need besides this one's; None for all that can be matched."""

    def get(self, epoch: int, rows_B: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """Return those outputs (B, ...) that are stored for every row, on the CPU."""

    def add(self, epoch: int, rows_B: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Offer outputs (B, ...) of rows, on any device; the store may keep them."""


class TeacherLookup:
    """Returns the teacher's outputs from a store, and runs the teacher for batches that it lacks.

    The stored outputs do not depend on temperature, dimension and weights of the terms: logits,
    the teacher's feature maps, and the spectra of its graphs. Masks and adjacency are not stored,
    since they are cheaper to compute than to keep.

    Args:
        teacher: it may have more levels than the objective reads; the outputs of all are stored.
        store: where outputs are looked up and stored.
        objective: objective of the run, which determines the outputs that are needed.
    """

    def __init__(self, teacher: Teacher, store: TeacherStore, objective: Objective):
        self.teacher, self._store, self._graph = teacher, store, objective.graph
        self._baseline_levels = objective.baseline_levels
        self._logits = ["logits"] if objective.reads_logits else []
        if objective.reads_proxies:
            self._logits.append("embeddings")
        self._batches = self._hits = 0

    def __call__(self, epoch: int, rows_B: Tensor, images_BCHW: Tensor) -> TeacherOutput:
        """Return the teacher's outputs for the images of rows; run it if they are not stored."""
        graph = self._graph
        levels = list(graph.student_shapes) if graph is not None else []
        needed = [*self._logits, *map(self._map, levels or self._baseline_levels)]
        spectra = [name for level in levels for name in self._spectrum(level)]
        stored = self._store.get(epoch, rows_B, [*needed, *spectra])
        parts = {name: part.to(images_BCHW.device) for name, part in stored.items()}
        new: dict[str, Tensor] = {}
        is_hit = parts.keys() >= set(needed)
        self._batches += 1
        self._hits += is_hit
        if not is_hit:
            new = self._run_teacher(images_BCHW)
            parts |= new
        graphs: dict[int, TeacherGraph] = {}
        for level in levels:
            assert graph is not None
            names = self._spectrum(level)
            spectrum = [parts[name] for name in names if name in parts]
            eigenpairs = (spectrum[0], spectrum[1]) if len(spectrum) == 2 else None
            graphs[level] = graph.teacher_graph(level, parts[self._map(level)], eigenpairs)
            if names and eigenpairs is None:
                graphs[level] = graph.with_spectrum(graphs[level])
                new |= zip(names, graphs[level].spectrum or (), strict=True)
        self._store.add(epoch, rows_B, new)
        maps = {level: parts[self._map(level)] for level in self._baseline_levels}
        proxies = self.teacher.proxies
        return TeacherOutput(
            graphs or maps,
            parts.get("logits"),
            maps,
            embeddings_BD=parts.get("embeddings"),
            proxies_KD=proxies.class_proxies_KD if proxies is not None else None,
        )

    def _run_teacher(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        output = self.teacher(images_BCHW)
        parts = {
            self._map(level): part
            for level, part in output.features.items()
            if isinstance(part, Tensor)
        }
        if self._logits:
            assert output.logits_BK is not None
            parts["logits"] = output.logits_BK
        if output.embeddings_BD is not None:
            parts["embeddings"] = output.embeddings_BD
        return parts

    def _map(self, level: int) -> str:
        """Return the name of the map that a level of the student is matched with."""
        return f"map {self.teacher.pairs[level]}"

    def _spectrum(self, level: int) -> tuple[str, ...]:
        """Return the names of a level's eigenvalues and basis; none where they are not needed."""
        graph = self._graph
        if graph is None or not graph.takes_spectra:
            return ()
        kind = f"{self.teacher.pairs[level]} {graph.weights}{' centred' if graph.centre else ''}"
        return f"eigenvalues {kind}", f"basis {kind}"

    def share(self, device: torch.device) -> float:
        """Return the share of the batches since the last call whose outputs were stored, 0 to 1.

        It is equal on every rank; every rank must call. Without a batch it is 0.
        """
        hits, batches = all_sum(
            torch.tensor([self._hits, self._batches], dtype=torch.float64, device=device)
        ).tolist()
        self._batches = self._hits = 0
        return hits / max(batches, 1.0)
