"""``raygkd tune --repeat`` from end to end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Command
from mlflow import MlflowClient
from mlflow.entities import Run
from records import (
    configuration_of,
    curves,
    images_of,
    plain_training,
    running,
    strange_numbers,
    without_times,
)

from raygkd import config as configuration
from raygkd.assembly.derived_configs import logit_baseline, without_teacher
from raygkd.assembly.methods import uses_teacher
from raygkd.engine import evaluate, run_epoch
from raygkd.models import load_model_file

EPOCHS, SEED = 2, 3
SEEDS = [SEED + 1, SEED + 2]
ROLES = ("best", "student_alone", "kd")
TUNE = (
    *("tune", "--dataset", "digits", "--limit-train", "256", "--student", "resnet8"),
    *("--seed", SEED, "--trials", "2", "--epochs", EPOCHS, "--repeat", len(SEEDS)),
)


@dataclass(frozen=True)
class Repeated:
    """A search with repeats."""

    result: dict[str, Any]

    @property
    def folder(self) -> Path:
        return Path(self.result["run"])


@pytest.fixture(scope="module")
def repeated(raygkd: Callable[..., Command], output: Path, untrained_teacher: Path) -> Repeated:
    return Repeated(
        raygkd(*TUNE, "--teacher", untrained_teacher, "--output", output, "--json").result()
    )


def children(client: MlflowClient, result: dict[str, Any]) -> dict[str, Run]:
    """Return name -> MLflow run of the repeats."""
    place = result["mlflow"]
    parent = f"tags.`mlflow.parentRunId` = '{place['parent_run_id']}'"
    runs = client.search_runs(
        [place["experiment_id"]], f"{parent} and tags.`raygkd.role` = 'repeat'"
    )
    assert len({run.info.run_name for run in runs}) == len(runs)
    return {run.info.run_name: run for run in runs}


def test_every_role_is_trained_with_the_seeds_after_the_searchs(repeated: Repeated) -> None:
    repeat = repeated.result["repeat"]
    assert repeat["seeds"] == SEEDS
    assert set(repeat["models"]) == set(ROLES)
    told = [(trial["seed"], trial["role"]) for trial in repeat["trials"]]
    assert told == [(seed, role) for seed in SEEDS for role in ROLES]
    for trial in repeat["trials"]:
        assert (trial["status"], trial["epochs"], trial["error"]) == ("finished", EPOCHS, None)


def test_means_and_deviations_are_those_of_the_scores(
    repeated: Repeated, client: MlflowClient
) -> None:
    repeat = repeated.result["repeat"]
    metrics = client.get_run(repeated.result["mlflow"]["parent_run_id"]).data.metrics
    scores = {role: np.array(entry["test_scores"]) for role, entry in repeat["models"].items()}
    entries = {role: (repeat["models"][role], scores[role]) for role in ROLES}
    for role in ROLES[1:]:
        entries[f"best_minus_{role}"] = (repeat["best_minus"][role], scores["best"] - scores[role])
        assert repeat["best_minus"][role]["differences"] == list(scores["best"] - scores[role])
    for name, (entry, values) in entries.items():
        assert len(values) == len(SEEDS)
        assert entry["mean"] == pytest.approx(values.mean())
        assert entry["std"] == pytest.approx(values.std(ddof=1))
        for key in ("mean", "std"):
            assert metrics[f"repeat_{name}_{key}"] == entry[key]


def test_the_verdict_is_over_the_seeds(repeated: Repeated) -> None:
    verdict, repeat = repeated.result["verdict"], repeated.result["repeat"]
    lead = repeat["best_minus"]["student_alone"]
    assert verdict["seeds"] == len(SEEDS)
    assert verdict["difference"] == pytest.approx(lead["mean"])
    # which images are in the test split is chance as well
    assert verdict["standard_error"] > lead["std"] / len(SEEDS) ** 0.5
    assert verdict["line"].endswith("over 2 seeds and 359 test images)")


@pytest.mark.parametrize("role", ROLES)
def test_a_repeat_is_a_training_of_the_same_settings_and_seed(
    repeated: Repeated, untrained_teacher: Path, client: MlflowClient, role: str
) -> None:
    """In this process, without Ray, on the search's split."""
    params = repeated.result["best"]["params"]
    values = {
        "best": params,
        "student_alone": without_teacher(params),
        "kd": logit_baseline(params),
    }
    searched = configuration_of(repeated.folder)
    config = configuration.with_settings(searched, {**values[role], "seed": SEEDS[-1]})
    file = load_model_file(untrained_teacher) if uses_teacher(config) else None
    training = plain_training(config, images_of(searched), file)
    run = children(client, repeated.result)[f"repeat {role.replace('_', ' ')} seed {SEEDS[-1]}"]
    found = curves(client, run.info.run_id)
    for epoch in range(1, EPOCHS + 1):
        metrics = without_times(run_epoch(training))
        assert {name: found[name][epoch] for name in metrics} == metrics
    score = evaluate(training, "test")["score"]
    assert repeated.result["repeat"]["models"][role]["test_scores"][-1] == score
    assert found["test_score"] == {EPOCHS: score}


def test_repeats_are_children_of_the_search(
    repeated: Repeated, client: MlflowClient, output: Path
) -> None:
    runs = children(client, repeated.result)
    trials = repeated.result["repeat"]["trials"]
    assert {run.info.run_id for run in runs.values()} == {trial["run_id"] for trial in trials}
    for trial in trials:
        run = runs[f"repeat {trial['role'].replace('_', ' ')} seed {trial['seed']}"]
        assert run.info.run_id == trial["run_id"]
        assert run.info.status == "FINISHED"
        assert run.data.params["seed"] == str(trial["seed"])
        assert run.data.metrics["val_score"] == trial["val_score"]
    assert running(client) == []
    assert strange_numbers(output) == []
