"""What a search registers and says where distillation does harm, and what it starts from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from outcomes import Ran

from raygkd.assembly.models import untrained_file
from raygkd.config import with_settings
from raygkd.config.search_space import Dimension, default_space
from raygkd.config.tree import Config
from raygkd.data.spec import ImageSpec
from raygkd.models import load_model_file, save_model_file
from raygkd.tracking.store import default_uri
from raygkd.workflows.champion import champion
from raygkd.workflows.first_trials import first_trials

CHANNELS = {1: 16, 2: 32, 3: 64}
DIGITS = ("--dataset", "digits", "--limit-train", "512", "--student", "resnet8", "--epochs", "3")


@pytest.fixture
def untaught(tmp_path: Path) -> Path:
    """A teacher of random weights for the digits."""
    spec = ImageSpec(
        class_names=tuple("0123456789"), image_size=(8, 8), mean=(0.3,) * 3, std=(0.4,) * 3
    )
    save_model_file(tmp_path / "untaught.pt", untrained_file("resnet14", spec))
    return tmp_path / "untaught.pt"


def test_a_search_that_loses_says_so_and_registers_the_student_alone(
    raygkd: Callable[..., Ran], untaught: Path, tmp_path: Path
) -> None:
    """The student learns nothing but the answers of a teacher that knows nothing."""
    output = tmp_path / "out"
    options = (*DIGITS, "--method", "kd", "--kd-weight", "1", "--trials", "1")
    ran = raygkd("tune", "--teacher", untaught, *options, "--output", output)
    assert ran.code == 0, ran.err
    [run] = (output / "runs").iterdir()
    result = json.loads((run / "result.json").read_text())
    best, alone, verdict = result["best"], result["student_alone"], result["verdict"]
    assert verdict["outcome"] == "worse"
    assert verdict["difference"] == pytest.approx(best["test_score"] - alone["test_score"])
    lines = ran.out.splitlines()
    assert lines[-1] == verdict["line"]
    assert lines[-1].startswith("verdict: worse: 0.")
    [note] = [line for line in lines if line.startswith("The student alone is the champion")]
    assert note.endswith("the best trial's student is best-student/model.pt in the run's folder.")
    assert result["champion"]["role"] == "student_alone"
    # the run's model is the champion; the best trial's student is kept for the report
    states = [load_model_file(run / name / "model.pt").state_dict for name in ("", "student-alone")]
    assert all(states[0][name].equal(states[1][name]) for name in states[0])
    assert (run / "best-student" / "model.pt").exists()
    registered = result["champion"]["registered"]
    client = MlflowClient(default_uri(output), default_uri(output))
    version = client.get_model_version_by_alias(registered["name"], "champion")
    assert version.tags["val_score"] == str(result["champion"]["val_score"])
    assert version.tags["raygkd.champion"] == "student_alone"

    (run / "result.json").rename(tmp_path / "first.json")
    again = raygkd("tune", "--resume", run, "--json")
    assert again.code == 0, again.err
    resumed = json.loads(again.out)
    for name in ("verdict", "champion", "best", "student_alone"):
        assert resumed[name] == result[name], name

    ran = raygkd("report", run, "--json")
    assert ran.code == 0, ran.err
    page = Path(json.loads(ran.out)["html"]).read_text()
    assert verdict["line"] in page
    assert "The student alone is the champion" in page
    models = json.loads(ran.out)["numbers"]["summary"]["models"]
    assert models["best student"]["test_score"] == best["test_score"]


@pytest.mark.parametrize(
    ("score", "best", "alone", "role"),
    [
        ("accuracy", 0.9, 0.8, "best"),
        ("accuracy", 0.8, 0.9, "student_alone"),
        ("accuracy", 0.9, 0.9, "best"),
        ("accuracy", 0.9, None, "best"),
        ("log-loss", 0.3, 0.4, "best"),
        ("log-loss", 0.4, 0.3, "student_alone"),
        ("map50", 0.3, 0.4, "student_alone"),
    ],
)
def test_validation_chooses_the_champion(
    score: str, best: float, alone: float | None, role: str
) -> None:
    found = champion(score, best, alone)
    scores = {"best": best, "student_alone": alone}
    assert (found["role"], found["val_score"]) == (role, scores.pop(role))
    assert found["beaten"] == scores.popitem()[1]


def first(trials: int, task: str = "classification", **settings: Any) -> list[dict[str, Any]]:
    config = with_settings(Config(), {"trials": trials, **settings})
    space = default_space(config.method.method, CHANNELS, lr=config.optim.lr)
    return first_trials(config, space, CHANNELS, task)


def test_a_search_starts_from_the_default_settings_and_kd() -> None:
    default, kd = first(3)
    assert default == {
        **{"lr": 0.05, "levels": [1, 2, 3], "dim": 8, "temperature": 20.0},
        **{"alpha": 3.0, "beta": 0.0, "gamma": 0.0},
    }
    assert kd == {"lr": 0.05, "method": "kd", "kd_temperature": 4.0, "kd_weight": 0.9}
    assert first(1) == first(2) == [default]
    assert first(8, lr=0.1)[1]["lr"] == first(8, lr=0.1)[0]["lr"] == 0.1
    assert first(8, task="detection") == [default]
    assert [len(first(8, method=method)) for method in ("kd", "at", "none")] == [1, 1, 1]
    # as published
    assert first(8, method="at") == [{"lr": 0.05, "baseline_weight": None}]


def test_a_given_space_is_kept_to() -> None:
    config = with_settings(Config(), {"space": "space.yaml"})
    inside, outside = ((Dimension("lr", "choice", (lr, 0.1)),) for lr in (0.05, 0.2))
    assert first_trials(config, inside, CHANNELS, "classification") == [{"lr": 0.05}]
    assert first_trials(config, outside, CHANNELS, "classification") == []


def imbalanced(tree: Callable[..., Path]) -> tuple[str, ...]:
    """Return the options of a run on images of which most are of one class."""
    return ("--dataset", "imagefolder", "--data-dir", str(tree(ant=80, bee=6, cat=20)))


def test_a_score_of_ones_own_ranks_and_an_earlier_search_is_a_start(
    raygkd: Callable[..., Ran], tree: Callable[..., Path], tmp_path: Path
) -> None:
    spec = ImageSpec(
        class_names=("ant", "bee", "cat"), image_size=(12, 12), mean=(0.5,) * 3, std=(0.2,) * 3
    )
    teacher = tmp_path / "teacher.pt"
    save_model_file(teacher, untrained_file("resnet14", spec))
    data = (*imbalanced(tree), "--batch-size", "8", "--epochs", "1", "--student", "resnet8")
    data += ("--teacher", str(teacher), "--output", str(tmp_path / "out"), "--json")
    ran = raygkd("tune", *data, "--score", "log-loss", "--trials", "3", "--name", "first")
    assert ran.code == 0, ran.err
    [line] = [line for line in ran.err.splitlines() if line.startswith("classes are imbalanced")]
    assert "ant has 64 training images and bee 4" in line
    assert "--score balanced-accuracy" in line
    result = json.loads(ran.out)
    assert result["selection"]["score"] == "log-loss"
    assert result["selection"]["rule"].startswith("lowest validation score")
    scores = [trial["val_score"] for trial in result["trials"]]
    assert scores == sorted(scores)
    assert result["best"]["val_score"] == scores[0] > 0
    assert result["best"]["test_score"] == result["best"]["test_metrics"]["log-loss"]
    assert set(result["best"]["test_metrics"]) == {
        *("loss", "accuracy", "balanced-accuracy", "macro-f1", "log-loss")
    }
    assert "log loss" in result["verdict"]["line"]
    is_alone = result["champion"]["role"] == "student_alone"
    assert result["champion"]["val_score"] <= result["champion"]["beaten"]
    assert is_alone == (result["champion"]["val_score"] < scores[0])
    ran = raygkd("report", result["run"], "--json")
    assert ran.code == 0, ran.err
    assert (
        "The score is the log loss (lower is better)."
        in Path(json.loads(ran.out)["html"]).read_text()
    )

    warm = ("--warm-start", str(tmp_path / "out"), "--trials", "2", "--name", "second")
    ran = raygkd("tune", *data, *warm, "--score", "balanced-accuracy")
    assert ran.code == 0, ran.err
    assert "classes are imbalanced" not in ran.err
    second = json.loads(ran.out)
    started = {trial["number"]: trial["params"] for trial in second["trials"]}
    assert [started[0], started[1]] == [trial["params"] for trial in result["trials"][:2]]
    run = Path(second["run"])
    (run / "result.json").unlink()
    resumed = raygkd("tune", "--resume", run, "--json")
    assert resumed.code == 0, resumed.err
    assert json.loads(resumed.out)["trials"] == second["trials"]


def test_an_earlier_search_must_suit(
    refused: Callable[..., str], good: tuple[str, ...], tmp_path: Path
) -> None:
    error = refused("tune", *good, "--warm-start", tmp_path / "nothing")
    assert f"--warm-start {tmp_path / 'nothing'}: has no config.yaml" in error
    folder = tmp_path / "runs" / "train-1"
    folder.mkdir(parents=True)
    for name in ("config.yaml", "facts.json", "result.json"):
        (folder / name).write_text("{}")
    error = refused("tune", *good, "--warm-start", folder)
    assert "is a run of 'raygkd train' and not of 'tune'" in error
    error = refused("tune", *good, "--warm-start", tmp_path)
    assert "has no finished run of 'raygkd tune'" in error


@pytest.mark.parametrize("score", ["map50", "fast"])
def test_a_score_of_another_task_is_refused(
    refused: Callable[..., str], good: tuple[str, ...], score: str
) -> None:
    error = refused("train", *good, "--score", score)
    if score == "fast":
        assert "'fast' is not one of 'auto', 'accuracy', 'balanced-accuracy'" in error
    else:
        assert "--score map50: is not a score for classification" in error
        assert "allowed: accuracy, balanced-accuracy, macro-f1, log-loss" in error


def test_train_with_a_control_ends_with_the_verdict(
    raygkd: Callable[..., Ran], untaught: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    options = (*DIGITS, "--method", "kd", "--kd-weight", "1", "--output", output)
    ran = raygkd("train", "--control", "--teacher", untaught, *options)
    assert ran.code == 0, ran.err
    [run] = (output / "runs").iterdir()
    result = json.loads((run / "result.json").read_text())
    verdict, models = result["verdict"], result["models"]
    assert list(models) == ["teacher", "student alone", "student"]
    assert verdict["outcome"] == "worse"
    scores = [models[role]["test_score"] for role in ("student", "student alone")]
    assert verdict["difference"] == pytest.approx(scores[0] - scores[1])
    assert ran.out.splitlines()[-1] == verdict["line"]
    # the control has the run's recipe and no teacher, and is a run below it
    client = MlflowClient(default_uri(output))
    [experiment] = client.search_experiments(filter_string="name = 'raygkd'")
    of_role = {
        one.data.tags["raygkd.role"]: one for one in client.search_runs([experiment.experiment_id])
    }
    control, student = of_role["student-alone"], of_role["student"]
    assert control.data.tags["mlflow.parentRunId"] == student.info.run_id
    assert control.data.params["method"] == "none"
    assert student.data.tags["verdict"] == verdict["line"]
    assert student.data.metrics["verdict_difference"] == pytest.approx(verdict["difference"])
    report = raygkd("report", run)
    assert report.code == 0, report.err
    assert verdict["line"] in (run / "report" / "index.html").read_text()


def test_a_student_without_a_teacher_has_no_control(
    raygkd: Callable[..., Ran], tmp_path: Path
) -> None:
    ran = raygkd("train", "--control", "--method", "none", "--output", tmp_path)
    assert (ran.code, ran.err.splitlines()[-1]) == (
        2,
        "error: --control: with --method none the student has no teacher, so it is its own "
        "control; omit --control, or choose another method",
    )
