"""``raygkd teacher`` and ``raygkd train`` from end to end: two processes, streams, Ctrl-C."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import REPOSITORY, Command
from mlflow import MlflowClient
from records import (
    EVERY_EPOCH,
    FIRST_STEP,
    TEST_SCORES,
    TIMES,
    configuration_of,
    curves,
    journal,
    plain_curve,
    rescored,
    running,
    strange_numbers,
)

from raygkd.engine import read_checkpoint
from raygkd.models import build_classifier, build_from_file, count_parameters, load_model_file

EPOCHS, TEACHER_EPOCHS = 6, 24
# 151 validation and 359 test images: two workers get unequal shares
IMAGES = ("--dataset", "digits", "--limit-train", "256", "--val-fraction", "0.105", "--seed", "3")
TEACHER = (
    *("teacher", *IMAGES, "--teacher", "resnet14", "--epochs", TEACHER_EPOCHS),
    # streamed: one CPU is for the images, and half a one for the training
    *("--cache-mb", "0", "--cpus-per-worker", "0.5"),
)
TRAIN = (
    *("train", *IMAGES, "--student", "resnet8", "--method", "graph+kd", "--epochs", str(EPOCHS)),
    *("--workers", "2", "--beta", "1", "--gamma", "0.5"),
)
SHARES = ("vertex", "edge", "spectral")
GRAPH_TERMS = ("kd", *SHARES)
Start = Callable[..., Command]


@dataclass(frozen=True)
class Interrupted:
    """The training of a teacher on streamed images, after Ctrl-C in the middle.

    Attributes:
        seconds: from the signal to the end.
        all_gone: whether no process is left.
        running: MLflow runs that are said to run.
        epochs: that are done.
        checkpoint: what it has to go on from.
    """

    command: Command
    folder: Path
    seconds: float
    all_gone: bool
    running: list[str]
    epochs: list[dict[str, float]]
    checkpoint: dict[str, Any]


@pytest.fixture(scope="module")
def interrupted(raygkd: Start, output: Path) -> Interrupted:
    command = raygkd(*TEACHER, "--output", output)

    def at_work() -> list[Path]:
        return [folder for folder in (output / "runs").glob("teacher-*") if journal(folder)]

    [folder] = command.until(at_work)
    seconds = command.stop(signal.SIGINT)
    return Interrupted(
        command=command,
        folder=folder,
        seconds=seconds,
        all_gone=command.gone(10),
        running=running(MlflowClient(f"sqlite:///{output / 'mlflow.db'}")),
        epochs=journal(folder),
        checkpoint=read_checkpoint(folder / "checkpoint.pt"),
    )


@dataclass(frozen=True)
class Trained:
    """A run that came to its end."""

    command: Command
    result: dict[str, Any]

    @property
    def folder(self) -> Path:
        return Path(self.result["run"])

    @property
    def model(self) -> Path:
        return Path(self.result["model"])


@pytest.fixture(scope="module")
def training(
    raygkd: Start, output: Path, untrained_teacher: Path, interrupted: Interrupted
) -> Command:
    """The training of a student by two workers on images in memory, which goes on meanwhile."""
    return raygkd(*TRAIN, "--teacher", untrained_teacher, "--output", output, "--json")


@pytest.fixture(scope="module")
def teacher(raygkd: Start, interrupted: Interrupted, training: Command) -> Trained:
    """The interrupted teacher, brought to its end by the command that was printed.

    It is killed on the way, and resumed once more.
    """
    [line] = [line for line in interrupted.command.err.splitlines() if line.startswith("stopped; ")]
    resume = line.partition("raygkd ")[2].split()
    killed = raygkd(*resume)
    killed.until(lambda: len(journal(interrupted.folder)) > len(interrupted.epochs) + 2)
    killed.kill_all()
    assert killed.seen["ray::TrainController"] == 0
    assert len(journal(interrupted.folder)) < TEACHER_EPOCHS
    command = raygkd(*resume)
    assert command.wait() == 0, command.err
    return Trained(command, json.loads((interrupted.folder / "result.json").read_text()))


@pytest.fixture(scope="module")
def trained(training: Command) -> Trained:
    """The student of two workers."""
    return Trained(training, training.result())


@pytest.fixture(scope="module")
def plain(interrupted: Interrupted) -> list[dict[str, float]]:
    """The epochs of the same teacher, trained in this process, without Ray or interruption."""
    return plain_curve(interrupted.folder)


# a teacher, on streamed images, interrupted and resumed


def test_ctrl_c_ends_a_run_with_its_processes_and_its_record(interrupted: Interrupted) -> None:
    assert interrupted.command.wait() == 130, interrupted.command.err
    assert interrupted.seconds < 15
    assert interrupted.all_gone, interrupted.command.survivors()
    assert interrupted.running == []
    assert len(interrupted.epochs) in range(1, TEACHER_EPOCHS)
    assert interrupted.command.err.count("stopping after this step, with a checkpoint") == 1
    # in the middle of an epoch
    [part] = interrupted.checkpoint["parts"]
    assert part["steps"] in range(1, 256 // 64 + 1)
    assert interrupted.checkpoint["epoch"] >= len(interrupted.epochs)
    assert interrupted.command.out == ""
    assert f"resume with: raygkd teacher --resume {interrupted.folder}\n" in interrupted.command.err
    assert "Traceback" not in interrupted.command.err


def test_a_streamed_run_trains_as_one_without_ray(
    interrupted: Interrupted, plain: list[dict[str, float]]
) -> None:
    assert interrupted.epochs == plain[: len(interrupted.epochs)]


def test_a_run_that_was_interrupted_and_killed_ends_as_any_other(
    teacher: Trained, interrupted: Interrupted, plain: list[dict[str, float]]
) -> None:
    assert teacher.folder == interrupted.folder
    assert journal(teacher.folder) == plain
    assert teacher.result["val_score"] == plain[-1]["val_score"]


def test_a_resumed_run_goes_on_in_its_mlflow_run_and_misses_no_epoch(
    teacher: Trained, plain: list[dict[str, float]], client: MlflowClient
) -> None:
    run = client.get_run(teacher.result["mlflow"]["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.tags["raygkd.role"] == "teacher"
    found = curves(client, run.info.run_id)
    assert set(found) == EVERY_EPOCH | {FIRST_STEP, "gradient_task"} | TEST_SCORES
    for epoch, metrics in enumerate(plain, start=1):
        assert {name: found[name][epoch] for name in metrics} == metrics
    assert found["test_score"] == {
        TEACHER_EPOCHS: teacher.result["models"]["teacher"]["test_score"]
    }


def test_without_json_the_result_is_a_table_and_where_to_look_next(
    teacher: Trained, output: Path
) -> None:
    rows = [" ".join(line.split()) for line in teacher.command.out.splitlines()]
    row = teacher.result["models"]["teacher"]
    assert f"teacher resnet14 175,258 100% {row['test_score']:.4f}" in rows
    assert f"validation score {teacher.result['val_score']:.4f}" in rows
    assert f"model file {teacher.model}" in rows
    assert f"compare raygkd ui --output {output}" in rows
    assert f"Models on {teacher.result['test_images']} images of the test split" in rows
    [line] = [row for row in rows if row.startswith("next ")]
    assert line == f"next {teacher.result['next']}"
    expected = ["raygkd", "tune", "--teacher", str(teacher.model), "--dataset", "digits"]
    assert shlex.split(teacher.result["next"])[:6] == expected


# a student, by two workers


def test_two_workers_are_two_processes_with_random_states_of_their_own(trained: Trained) -> None:
    assert trained.command.seen["ray::RayTrainWorker"] == 2
    path = trained.folder / "checkpoint.pt"
    states = [state["cpu"] for state in torch.load(path, weights_only=True)["rng"]]
    assert len(states) == 2
    assert not torch.equal(*states)


def test_the_result_holds_teacher_and_student(trained: Trained, untrained_teacher: Path) -> None:
    result = trained.result
    assert set(result) == {
        *("models", "score", "val_score", "verdict", "int8", "mlflow", "run", "model", "teacher"),
        *("seconds", "test_images"),
    }
    assert list(result["models"]) == ["teacher", "student"]
    assert result["teacher"] == {"path": str(untrained_teacher)}
    score = rescored(untrained_teacher, trained.folder, "test")["score"]
    row = dict(result["models"]["teacher"])
    assert row.pop("test_metrics")["accuracy"] == score
    assert row == {"model": "resnet14", "parameters": 175_258, "test_score": score}
    assert result["models"]["student"]["parameters"] == 78_042
    assert set(result["mlflow"]) == {"tracking_uri", "experiment_id", "run_id"}
    assert json.loads((trained.folder / "result.json").read_text()) == result


def test_a_model_is_evaluated_as_its_run_has_scored_it(
    trained: Trained, untrained_teacher: Path, output: Path, raygkd: Callable[..., Command]
) -> None:
    models = trained.folder / "model.pt", untrained_teacher
    evaluated = raygkd("evaluate", *models, *IMAGES, "--output", output, "--json").result()
    assert evaluated["split"] == "test"
    for path, role in zip(models, ("student", "teacher"), strict=True):
        row, expected = evaluated["models"][str(path)], trained.result["models"][role]
        assert row["scores"]["score"] == expected["test_score"]
        assert row["parameters"] == expected["parameters"]


def test_a_teacher_that_is_given_is_used_and_no_other_is_trained(
    trained: Trained, untrained_teacher: Path, output: Path
) -> None:
    assert "training teacher" not in trained.command.err
    assert trained.command.seen["ray::TrainController"] == 1
    assert not (output / "teachers").exists()
    assert configuration_of(trained.folder).model.teacher == str(untrained_teacher)


def test_the_model_file_holds_the_student_alone(trained: Trained) -> None:
    file = load_model_file(trained.model)
    student = build_classifier("resnet8", 10)
    assert (file.name, file.class_names) == ("resnet8", tuple("0123456789"))
    assert {name: tensor.shape for name, tensor in file.state_dict.items()} == {
        name: tensor.shape for name, tensor in student.state_dict().items()
    }
    assert count_parameters(build_from_file(file)) == count_parameters(student)


def test_every_image_is_scored_once_by_two_workers(trained: Trained) -> None:
    last = journal(trained.folder)[-1]
    alone = rescored(trained.model, trained.folder, "val")
    # one image more, less, or twice would be 1 in 151 of both
    assert last["val_score"] == alone["score"] == trained.result["val_score"]
    assert last["val_loss"] == pytest.approx(alone["loss"], rel=1e-6)
    test_score = rescored(trained.model, trained.folder, "test")["score"]
    assert trained.result["models"]["student"]["test_score"] == test_score


def test_mlflow_has_every_term_score_and_time_of_every_epoch(
    trained: Trained, client: MlflowClient
) -> None:
    run_id = trained.result["mlflow"]["run_id"]
    assert client.get_run(run_id).info.status == "FINISHED"
    found = curves(client, run_id)
    terms = {f"loss_{term}" for term in GRAPH_TERMS} | {f"factor_{term}" for term in SHARES}
    for name in EVERY_EPOCH | terms:
        assert set(found[name]) == set(range(1, EPOCHS + 1)), name
    first = {FIRST_STEP, *(f"gradient_{term}" for term in ("task", *GRAPH_TERMS))}
    assert set(found) == EVERY_EPOCH | terms | first | TEST_SCORES
    for epoch, metrics in enumerate(journal(trained.folder), start=1):
        assert {name: found[name][epoch] for name in metrics} == metrics
    assert all(value > 0 for name in TIMES for value in found[name].values())


def test_the_test_split_is_scored_once_for_the_final_model(
    trained: Trained, client: MlflowClient
) -> None:
    found = curves(client, trained.result["mlflow"]["run_id"])
    score = trained.result["models"]["student"]["test_score"]
    of_test = {name: found[name] for name in found if "test" in name}
    assert of_test.keys() == TEST_SCORES
    assert all(list(scores) == [EPOCHS] for scores in of_test.values())
    assert of_test["test_score"] == {EPOCHS: score}
    assert not [name for metrics in journal(trained.folder) for name in metrics if "test" in name]


def test_a_run_is_tagged_with_split_commit_and_versions(
    trained: Trained, client: MlflowClient
) -> None:
    tags = client.get_run(trained.result["mlflow"]["run_id"]).data.tags
    assert tags["raygkd.role"] == "student"
    assert tags["raygkd.split"] == "train 256, val 151, test 359"
    assert tags["version.torch"] == version("torch")
    assert {f"version.{name}" for name in ("raygkd", "torchvision", "ray", "mlflow")} <= set(tags)
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert tags["mlflow.source.git.commit"] == git.stdout.strip()


def test_no_run_is_left_open_and_no_number_is_strange(
    trained: Trained, client: MlflowClient, output: Path
) -> None:
    assert running(client) == []
    assert strange_numbers(output) == []


def test_a_dashboard_that_does_not_start_is_one_line(
    raygkd: Callable[..., Command], tmp_path: Path
) -> None:
    # Ray raises a bare Exception for it
    (tmp_path / "aiohttp.py").write_text("raise ImportError('broken for a test')\n")
    train = ("train", "--dataset", "digits", "--method", "none", "--student", "resnet8")
    command = raygkd(
        # streamed images need Ray
        *(*train, "--epochs", "1", "--cache-mb", "0", "--output", tmp_path / "output"),
        environment={"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"},
    )
    assert command.wait() == 2
    assert command.err.splitlines()[-1].startswith("error: Ray does not start on this machine: ")
    assert command.err.endswith("; see 'raygkd doctor'\n")
    assert "Traceback" not in command.err
