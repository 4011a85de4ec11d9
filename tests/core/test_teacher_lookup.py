"""Runs that find what the teacher says in a store: the same numbers, and a teacher left alone.

Shapes: B batch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from small_detections import detection_training, prepare_scenes
from small_runs import TensorStream, curve, make_training, random_batch
from torch import Tensor

from raygkd.data.parquet import ImageTable
from raygkd.engine import Training, run_epoch


@dataclass
class KeptHere:
    """A store in this process that keeps everything."""

    levels: tuple[int, ...] | None = None
    kept: dict[tuple[int, int, str], Tensor] = field(default_factory=dict)

    def get(self, epoch: int, rows_B: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """Return those parts that are known of every row."""
        rows = rows_B.tolist()
        return {
            name: torch.stack([self.kept[epoch, row, name] for row in rows])
            for name in names
            if all((epoch, row, name) in self.kept for row in rows)
        }

    def add(self, epoch: int, rows_B: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Keep parts of rows."""
        for name, part in parts.items():
            for row, value in zip(rows_B.tolist(), part, strict=True):
                self.kept[epoch, row, name] = value.clone()

    def names(self) -> set[str]:
        """Return the names of all parts."""
        return {name for _, _, name in self.kept}


def count_calls(training: Training) -> list[int]:
    """Return a list that grows with every forward pass of a run's teacher."""
    calls: list[int] = []
    assert training.teacher is not None
    teacher = training.teacher.model
    # a detector's backbone runs, not the detector
    part = getattr(teacher, "net", teacher)
    part = getattr(part, "backbone", part)
    part.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    return calls


def without_share(epochs: list[dict[str, float]]) -> tuple[list[float], list[dict[str, float]]]:
    shares = [metrics.pop("teacher_cached") for metrics in epochs]
    return shares, epochs


@pytest.mark.parametrize(
    ("shared", "runs"),
    [
        (
            {"method": "graph+kd"},
            [
                {"levels": [3], "dim": 2, "temperature": 0.2},
                {"levels": [1, 2, 3], "dim": 8, "attention": "softmax", "kd_weight": 0.5},
            ],
        ),
        (
            {"method": "graph"},
            [
                {"gamma": 0.0},
                {"spectral_mode": "procrustes"},
                {"levels": [2, 1], "centre": True},
                {"levels": [2], "weights": "cosine"},
            ],
        ),
        ({"method": "graph", "amp": "bf16"}, [{"lr": 0.1}, {"spectral_mode": "subspace"}]),
        ({"method": "kd"}, [{}, {"kd_temperature": 2.0, "lr": 0.01}]),
        (
            {"dim": 2},
            [{"method": "at"}, {"method": "sp", "levels": [1, 2]}, {"method": "ickd"}],
        ),
        (
            {"method": "graph+metrics"},
            [{}, {"levels": [2, 1], "centre": True}, {"graphs": "batch"}, {"method": "trg"}],
        ),
        ({"method": "prg"}, [{}, {"prg.edge": 2.0}, {"method": "kd"}]),
    ],
    ids=["graph+kd", "other graphs", "bf16", "kd", "feature baselines", "metrics", "proxies"],
)
def test_runs_with_and_without_a_store_are_equal_and_only_the_first_asks_the_teacher(
    digits: ImageTable, shared: dict[str, Any], runs: list[dict[str, Any]]
):
    store = KeptHere()
    for number, settings in enumerate(runs):
        plain = curve(make_training(digits, **(shared | settings)))
        training = make_training(digits, teacher_store=store, **(shared | settings))
        calls = count_calls(training)
        shares, epochs = without_share(curve(training))
        assert epochs == plain
        # the check before the first step has told what the first step asks
        assert shares == ([1.0, 1.0] if number else [0.2, 0.0])
        assert len(calls) == (0 if number else 8)


def test_a_run_without_a_store_does_not_speak_of_it(digits: ImageTable):
    assert "teacher_cached" not in run_epoch(make_training(digits, epochs=1))


@pytest.mark.parametrize(("levels", "kept"), [(None, {1, 2, 3}), ((3,), {2, 3}), ((1, 2), {1, 2})])
def test_maps_are_kept_of_the_levels_that_others_may_want(
    digits: ImageTable, levels: tuple[int, ...] | None, kept: set[int]
):
    store = KeptHere(levels)
    run_epoch(make_training(digits, method="graph", levels=[2], teacher_store=store))
    spectra = {"eigenvalues 2 shifted", "basis 2 shifted"}
    assert store.names() == {f"map {level}" for level in kept} | spectra


def test_a_batch_that_is_known_in_part_is_asked_as_a_whole():
    batches = [{**random_batch(seed), "row": torch.arange(64) + 64 * seed} for seed in range(2)]
    mixed = {name: torch.cat([batches[0][name][:40], batches[1][name][:24]]) for name in batches[0]}
    store = KeptHere()
    run_epoch(make_training(TensorStream(batches[:1]), teacher_store=store))
    training = make_training(TensorStream([mixed, batches[0]]), teacher_store=store)
    calls = count_calls(training)
    run_epoch(training)
    assert calls == [64]
    assert {row for _, row, _ in store.kept} == {*range(64), *range(64, 88)}


def test_detectors_find_their_pyramids_in_a_store(tmp_path_factory: pytest.TempPathFactory):
    scenes = prepare_scenes(tmp_path_factory.mktemp("scenes") / "shards")
    store = KeptHere()
    for settings in ({"levels": [4]}, {"dim": 2, "temperature": 3.0}):
        plain = curve(detection_training(scenes, epochs=1, **settings))
        training = detection_training(scenes, epochs=1, teacher_store=store, **settings)
        calls = count_calls(training)
        shares, epochs = without_share(curve(training))
        assert epochs == plain
    assert shares == [1.0]
    assert calls == []
