"""``raygkd tune`` over several students, with costs, from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from outcomes import Ran

from raygkd.commands import Run
from raygkd.metrics.pareto import front
from raygkd.models import load_model_file
from raygkd.workflows.model_locator import find_model

DIGITS = ("--dataset", "digits", "--limit-train", "256", "--epochs", "2", "--teacher-epochs", "1")


def test_a_search_over_students_ends_with_their_front(
    raygkd: Callable[..., Ran], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    students = ("--students", "resnet8,resnet14,resnet20", "--methods", "graph,logit-std")
    aims = ("--objective", "score,latency", "--max-params", "200000", "--trials", "5")
    aims += ("--budget-of", "int8")
    ran = raygkd("tune", *DIGITS, *students, *aims, "--output", output, "--name", "one")
    assert ran.code == 0, ran.err
    assert "not trained: resnet20: 272,474 parameters (--max-params 200,000)" in ran.err
    run = output / "runs" / "tune-one"
    result = json.loads((run / "result.json").read_text())
    rows = result["students"]
    assert {row["student"] for row in rows} == {"resnet8", "resnet14"}
    # the same as by brute force over all trials
    scored = [trial for trial in result["trials"] if trial["val_score"] is not None]
    costs = {row["student"]: row["costs"] for row in rows}
    points = [
        [trial["val_score"], -costs[trial["params"]["student"]]["int8_latency"]] for trial in scored
    ]
    best = {scored[place]["params"]["student"] for place in front(points)}
    assert best == {row["student"] for row in rows if row["front"]}
    for row in rows:
        assert 0 < row["costs"]["int8_mb"] < row["costs"]["mb"]
        assert (row["model"] is not None) == row["front"]
        if row["front"]:
            assert load_model_file(row["model"]).name == row["student"]
    _check_versions(output, run, result)
    methods = {(trial["params"]["student"], trial["params"]["method"]) for trial in scored}
    assert len(methods) == 4
    assert result["best"]["model"] == result["student_alone"]["model"]
    assert "Students by validation score" in ran.out
    assert (run / "front.png").stat().st_size > 5000
    report = raygkd("report", run)
    assert report.code == 0, report.err
    assert (run / "report" / "front.png").exists()
    # nothing is left to do, and nothing is drawn anew
    again = raygkd("tune", "--resume", run, "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["trials"] == result["trials"]


def _check_versions(output: Path, run: Path, result: dict[str, Any]) -> None:
    """Check that each model of the front is found by its version, which has its costs."""
    listed = Run(str(run))
    assert list(listed.front["model"]) == [
        row["model"] for row in result["students"] if row["front"]
    ]
    is_best = result["champion"]["role"] == "best"
    winner = result["trials"][0]["number"]
    client = MlflowClient(result["mlflow"]["tracking_uri"])
    for row in result["students"]:
        version = row["registered"]
        if row["number"] == winner:
            assert version == result["best"]["registered"]
            assert (version is not None) == is_best
        elif row["front"]:
            uri = f"models:/{version['name']}/{version['version']}"
            assert uri in set(listed.front["model_uri"])
            found = find_model(uri, tracking_uri=None, output=str(output))
            assert found == Path(row["model"])
            tags = client.get_model_version(version["name"], version["version"]).tags
            assert float(tags["raygkd.cost.params"]) == row["costs"]["params"]
            assert float(tags["val_score"]) == row["val_score"]
        else:
            assert version is None


def test_teachers_sizes_and_augmentations_are_chosen_among(
    raygkd: Callable[..., Ran], tmp_path: Path
) -> None:
    output, space = tmp_path / "out", tmp_path / "space.yaml"
    space.write_text(
        "teacher: {choice: [resnet8, resnet14]}\n"
        "image_size: {choice: [8, 12]}\n"
        "augment: {choice: [none, crop]}\n"
        "method: {choice: [kd, dist]}\n"
        "kd_temperature: {uniform: [2, 8]}\n"
    )
    options = ("--space", space, "--teacher-cache-mb", "16", "--objective", "score,mflops")
    given = (*DIGITS[:4], "--epochs", "1", "--teacher-epochs", "1", "--trials", "8", "--seed", "2")
    ran = raygkd("tune", *given, *options, "--output", output, "--name", "all", "--json")
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    assert {trial["status"] for trial in result["trials"]} <= {"finished", "stopped"}
    params = [trial["params"] for trial in result["trials"]]
    for name in ("teacher", "image_size", "augment"):
        assert len({one[name] for one in params}) == 2, params
    # each teacher was trained once, for the images of all sizes
    teachers = sorted((output / "teachers").glob("*/model.pt"))
    assert [load_model_file(path).name for path in teachers] == ["resnet14", "resnet8"]
    assert {load_model_file(path).image_size for path in teachers} == {(12, 12)}
    # the result is about the best trial's
    best = params[0]
    run = output / "runs" / "tune-all"
    assert load_model_file(result["teacher"]["path"]).name == best["teacher"]
    assert load_model_file(run / "model.pt").image_size == (best["image_size"],) * 2
    for row in result["students"]:
        if row["front"]:
            assert load_model_file(row["model"]).image_size == (row["image_size"],) * 2
    costs = {row["image_size"]: row["costs"]["mflops"] for row in result["students"]}
    assert costs[12] > 2 * costs[8]
    report = raygkd("report", run)
    assert report.code == 0, report.err
    (run / "result.json").unlink()
    again = raygkd("tune", "--resume", run, "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["trials"] == result["trials"]


def test_no_student_within_the_budget_is_told_before_anything_is_trained(
    raygkd: Callable[..., Ran], tmp_path: Path
) -> None:
    students = ("--students", "resnet8,resnet14", "--max-mb", "0.1")
    ran = raygkd("tune", *DIGITS, *students, "--output", tmp_path / "out")
    assert ran.code == 2
    assert ran.err.splitlines()[-1] == (
        "error: no student is within the budget; the nearest is resnet8: 0.312168 MB (--max-mb "
        "0.1); raise the limit, or add a smaller student (--students)"
    )
    assert not (tmp_path / "out" / "teachers").exists()


@pytest.mark.parametrize(
    ("students", "message"),
    [
        ("", "--students '': is empty; omit it, or pass a value"),
        ("resnet8,nope", "--students: unknown classifier 'nope'"),
        (
            "resnet8,timm:vit_tiny_patch16_224",
            "--students timm:vit_tiny_patch16_224: TimmModel cannot take images of 8 x 8 pixels",
        ),
    ],
)
def test_an_error_names_the_student(
    raygkd: Callable[..., Ran], tmp_path: Path, students: str, message: str
) -> None:
    output = ("--output", tmp_path / "out")
    ran = raygkd("tune", *DIGITS, "--students", students, "--student-weights", "none", *output)
    assert ran.code == 2
    assert message in ran.err.splitlines()[-1]


def test_a_search_ends_in_its_time_with_the_best_so_far(
    raygkd: Callable[..., Ran], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    options = (*DIGITS[:4], "--epochs", "50", "--teacher-epochs", "1", "--trials", "50")
    budget = ("--time-budget", "20s", "--scheduler", "none", "--output", output, "--name", "short")
    ran = raygkd("tune", *options, *budget)
    assert ran.code == 0, ran.err
    result = json.loads((output / "runs" / "tune-short" / "result.json").read_text())
    assert 1 <= len(result["trials"]) < 50
    assert f"--time-budget 20s is over after {len(result['trials'])} of 50 trials" in ran.err
    assert result["best"]["val_score"] == max(trial["val_score"] for trial in result["trials"])


def test_a_time_budget_has_a_unit(raygkd: Callable[..., Ran]) -> None:
    ran = raygkd("tune", "--time-budget", "20")
    assert (ran.code, ran.err.splitlines()[-1]) == (
        2,
        "error: --time-budget '20': must be a number above 0 with its unit, such as 90s, 30m or 2h",
    )


def test_a_function_of_a_file_is_a_student(
    raygkd: Callable[..., Ran], workplace: Path, tmp_path: Path
) -> None:
    """Workers run in other folders, and a resumed search has a copy of the file."""
    (workplace / "nets.py").write_text(
        "from torch import nn\n\n\ndef tiny(classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
        "                         nn.Linear(8, classes))\n"
    )
    students = ("--students", "nets.py:tiny,resnet8", "--methods", "kd,dist", "--trials", "4")
    options = (*DIGITS, "--epochs", "1", *students, "--name", "nets", "--output", tmp_path / "out")
    ran = raygkd("tune", *options, "--json")
    assert ran.code == 0, ran.err
    trials = json.loads(ran.out)["trials"]
    assert {trial["status"] for trial in trials} <= {"finished", "stopped"}
    assert {Path(trial["params"]["student"]).name[-12:] for trial in trials} == {
        "nets.py:tiny",
        "resnet8",
    }
    (workplace / "nets.py").unlink()
    (tmp_path / "out" / "runs" / "tune-nets" / "result.json").unlink()
    again = raygkd("tune", "--resume", tmp_path / "out", "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["trials"] == trials
