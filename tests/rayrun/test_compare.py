"""``raygkd compare`` from end to end."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
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
    rescored,
    running,
    strange_numbers,
    without_times,
)

from raygkd import config as configuration
from raygkd.assembly.methods import uses_teacher
from raygkd.engine import evaluate, run_epoch
from raygkd.models import load_model_file
from raygkd.rayrun.search_history import Trial
from raygkd.report.console import stderr_console
from raygkd.workflows.finished_run import FinishedRun, open_finished
from raygkd.workflows.report import write_report

EPOCHS, SEED = 2, 3
SEEDS = [SEED, SEED + 1]
METHODS = ("none", "ickd", "dkd", "graph")
COMPARE = (
    *("compare", "--dataset", "digits", "--limit-train", "256", "--student", "resnet8"),
    *("--seed", SEED, "--seeds", len(SEEDS), "--epochs", EPOCHS, "--methods", ",".join(METHODS)),
)


@pytest.fixture(scope="module")
def command(raygkd: Callable[..., Command], output: Path, untrained_teacher: Path) -> Command:
    command = raygkd(*COMPARE, "--teacher", untrained_teacher, "--output", output, "--json")
    command.result()
    return command


@pytest.fixture(scope="module")
def result(command: Command) -> dict[str, Any]:
    return json.loads(command.out)


def children(client: MlflowClient, result: dict[str, Any], parent: str) -> dict[str, Run]:
    """Return name -> MLflow run of those below a run."""
    runs = client.search_runs(
        [result["mlflow"]["experiment_id"]], f"tags.`mlflow.parentRunId` = '{parent}'"
    )
    assert len({run.info.run_name for run in runs}) == len(runs)
    return {run.info.run_name: run for run in runs}


def methods_of(client: MlflowClient, result: dict[str, Any]) -> dict[str, Run]:
    return children(client, result, result["mlflow"]["parent_run_id"])


def test_every_method_is_trained_with_every_seed(result: dict[str, Any]) -> None:
    told = [(one["seed"], one["role"]) for one in result["trainings"]]
    assert told == [(seed, method) for seed in SEEDS for method in METHODS]
    for one in result["trainings"]:
        assert (one["status"], one["epochs"], one["error"]) == ("finished", EPOCHS, None)


def test_what_takes_long_after_the_trainings_is_shown(command: Command) -> None:
    lines = command.err.splitlines()
    # the models of one seed at a time, then the best one beside the teacher
    scored = [line for line in lines if line.startswith("scoring models on the test split: ")]
    assert [line.rpartition(" ")[2] for line in scored].count("4/4") == len(SEEDS)
    assert any(line.startswith("measuring steps side by side: ") for line in lines)


def test_methods_are_ranked_by_the_mean_over_the_seeds(result: dict[str, Any]) -> None:
    comparison = result["comparison"]
    assert comparison["seeds"] == SEEDS
    means = [np.mean(one["scores"]) for one in comparison["methods"]]
    assert means == sorted(means, reverse=True)
    assert {one["method"] for one in comparison["methods"]} == set(METHODS)
    for one in comparison["methods"]:
        assert one["mean"] == pytest.approx(np.mean(one["scores"]))


def test_a_step_costs_time_and_memory(result: dict[str, Any]) -> None:
    costs = {one["method"]: one for one in result["comparison"]["methods"]}
    assert costs["none"]["step_ratio"] == costs["none"]["peak_ratio"] == 1.0
    for method in METHODS[1:]:
        assert costs[method]["seconds_per_step"] > 0
        # teacher and adapters are held besides
        assert costs[method]["peak_ratio"] > 1.0


@pytest.mark.parametrize("method", METHODS)
def test_a_training_is_the_same_without_ray(
    result: dict[str, Any], untrained_teacher: Path, client: MlflowClient, method: str
) -> None:
    compared = configuration_of(Path(result["run"]))
    config = configuration.with_settings(compared, {"method": method, "seed": SEEDS[-1]})
    file = load_model_file(untrained_teacher) if uses_teacher(config) else None
    training = plain_training(config, images_of(compared), file)
    [told] = [
        one for one in result["trainings"] if (one["seed"], one["role"]) == (SEEDS[-1], method)
    ]
    found = curves(client, told["run_id"])
    for epoch in range(1, EPOCHS + 1):
        metrics = without_times(run_epoch(training))
        assert {name: found[name][epoch] for name in metrics} == metrics
    [ranked] = [one for one in result["comparison"]["methods"] if one["method"] == method]
    assert ranked["scores"][-1] == evaluate(training, "test")["score"]


def test_mlflow_has_a_run_for_each_method_and_one_for_each_seed_below_it(
    result: dict[str, Any], client: MlflowClient, output: Path
) -> None:
    methods = methods_of(client, result)
    assert set(methods) == set(METHODS)
    ranked = {one["method"]: one for one in result["comparison"]["methods"]}
    names = {frozenset(run.data.params) for run in methods.values()}
    assert len(names) == 1
    for name, run in methods.items():
        assert run.info.status == "FINISHED"
        assert run.data.params["method"] == name
        assert run.data.metrics["test_score"] == ranked[name]["mean"]
        assert run.data.metrics["seconds_per_step"] == ranked[name]["seconds_per_step"]
        seeds = children(client, result, run.info.run_id)
        assert set(seeds) == {f"{name} seed {seed}" for seed in SEEDS}
        for seed, one in zip(SEEDS, ranked[name]["scores"], strict=True):
            assert seeds[f"{name} seed {seed}"].data.metrics["test_score"] == one
    assert running(client) == []
    assert strange_numbers(output) == []


def test_the_runs_description_is_the_ranked_table(
    result: dict[str, Any], client: MlflowClient
) -> None:
    run = client.get_run(result["mlflow"]["parent_run_id"])
    # the teacher was given as a file
    assert run.info.run_name == "comparison resnet14 -> resnet8"
    best = result["comparison"]["methods"][0]
    row = f"| 1 | {best['method']} | {best['mean']:.4f} |"
    assert row in run.data.tags["mlflow.note.content"]
    pictures = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert "comparison.png" in pictures


def test_the_verdict_is_of_the_best_method_against_the_student_alone(
    result: dict[str, Any], client: MlflowClient
) -> None:
    verdict = result["verdict"]
    methods = {one["method"]: one for one in result["comparison"]["methods"]}
    distilled = [methods[name] for name in METHODS if name != "none"]
    assert verdict["method"] == max(distilled, key=lambda one: one["val_mean"])["method"]
    lead = methods[verdict["method"]]["mean"] - methods["none"]["mean"]
    assert verdict["difference"] == pytest.approx(lead)
    assert (verdict["seeds"], verdict["images"]) == (len(SEEDS), 359)
    run = client.get_run(result["mlflow"]["parent_run_id"]).data
    assert run.tags["verdict"] == verdict["line"]
    assert run.metrics["verdict_difference"] == pytest.approx(lead)


def test_the_best_student_by_validation_is_written_for_use(result: dict[str, Any]) -> None:
    folder = Path(result["run"])
    seed, method = result["selection"]["seed"], result["selection"]["method"]
    [ranked] = [one for one in result["comparison"]["methods"] if one["method"] == method]
    score = rescored(folder / "model.pt", folder, "test")["score"]
    assert score == ranked["scores"][SEEDS.index(seed)] == result["models"]["best"]["test_score"]


def test_its_report_ranks_the_methods_and_is_about_the_best_student(
    result: dict[str, Any], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    told = write_report(result["run"], str(page), console=stderr_console())
    assert told["numbers"]["comparison"] == result["comparison"]
    shown = {"summary", "comparison", "sizes", "graphs", "attention", "losses", "examples"}
    assert set(told["numbers"]) == shown
    best = told["numbers"]["summary"]["models"]["best student"]
    assert best["test_score"] == result["models"]["best"]["test_score"]
    html = page.read_text()
    ranked = [one["method"] for one in result["comparison"]["methods"]]
    table = html[html.index("Methods compared</h2>") :]
    places = [table.index(f">{method}<") for method in ranked]
    assert places == sorted(places)


def test_its_report_shows_the_best_graphs_where_another_method_is_best(
    result: dict[str, Any],
) -> None:
    of = {method: [t for t in result["trainings"] if t["role"] == method] for method in METHODS}
    best = max(of["graph"], key=lambda one: one["val_score"])
    matching = report_about(result, of["ickd"][0]).matching
    assert matching is not None
    assert matching.student == f"student of 'graph' with seed {best['seed']}"
    assert matching.config.method.method == "graph"
    assert matching.config.optim.seed == best["seed"]
    assert matching.folder.name == f"{best['number']:04d}"
    assert matching.checkpoint() is not None


def test_its_report_shows_the_graphs_of_the_best_student_where_it_has_any(
    result: dict[str, Any],
) -> None:
    [one] = [t for t in result["trainings"] if (t["role"], t["seed"]) == ("graph", SEEDS[1])]
    matching = report_about(result, one).matching
    assert matching is not None
    assert matching.student == "best student"
    assert matching.config.optim.seed == SEEDS[1]
    assert matching.folder.name == f"{one['number']:04d}"


def report_about(result: dict[str, Any], training: dict[str, Any]) -> FinishedRun:
    """Return the comparison as if it had chosen one of its trainings."""
    winner = Trial(number=training["number"], params=training["params"], status="finished")
    return dataclasses.replace(open_finished(result["run"]), winner=winner)


def test_a_comparison_that_is_broken_off_goes_on(
    raygkd: Callable[..., Command], result: dict[str, Any], output: Path, untrained_teacher: Path
) -> None:
    """As if the process had been killed after some trainings, one of them in the middle."""
    folder = Path(result["run"])
    copy = folder.with_name("compare-broken-off")
    journal = (folder / "trials.jsonl").read_text().splitlines(keepends=True)
    shutil.copytree(folder / "trials", copy / "trials")
    for name in ("config.yaml", "facts.json"):
        (copy / name).write_bytes((folder / name).read_bytes())
    (copy / "trials.jsonl").write_text("".join(journal[: len(journal) // 2]))
    again = raygkd("compare", "--resume", copy, "--json").result()
    scores = {one["method"]: one["scores"] for one in again["comparison"]["methods"]}
    assert scores == {one["method"]: one["scores"] for one in result["comparison"]["methods"]}
