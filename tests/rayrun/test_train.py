"""``raygkd teacher`` and ``raygkd train`` from end to end: two processes, streams, Ctrl-C."""

from __future__ import annotations

import json
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
from records import EVERY_EPOCH, TIMES, curves, journal, rescored, running, strange_numbers

from raygkd import config as configuration
from raygkd.models import build_classifier, build_from_file, count_parameters, load_model_file

EPOCHS = 6
# 151 validation and 359 test images: two workers get unequal shares
IMAGES = ("--dataset", "digits", "--limit-train", "256", "--val-fraction", "0.105")
TRAIN = (
    *("train", *IMAGES, "--student", "resnet8", "--method", "graph+kd", "--seed", "3"),
    *("--workers", "2", "--cpus-per-worker", "0.5", "--batch-size", "64", "--epochs", str(EPOCHS)),
)
GRAPH_TERMS = ("kd", "vertex", "edge", "spectral")
Start = Callable[..., Command]


@pytest.fixture(scope="module")
def teacher(raygkd: Start, output: Path) -> dict[str, Any]:
    """The result of training a teacher by itself."""
    settings = ("--teacher", "resnet14", "--epochs", "2", "--seed", "3")
    return raygkd("teacher", *IMAGES, *settings, "--output", output, "--json").result()


@dataclass(frozen=True)
class Trained:
    """A run of two workers from beginning to end, with its images in memory."""

    command: Command
    result: dict[str, Any]

    @property
    def folder(self) -> Path:
        return Path(self.result["run"])

    @property
    def model(self) -> Path:
        return Path(self.result["model"])


@pytest.fixture(scope="module")
def trained(raygkd: Start, output: Path, teacher: dict[str, Any]) -> Trained:
    command = raygkd(*TRAIN, "--teacher", teacher["model"], "--output", output, "--json")
    return Trained(command, command.result())


@dataclass(frozen=True)
class Interrupted:
    """The same run with streamed images, after Ctrl-C in the middle.

    Attributes:
        seconds: from the signal to the end.
        all_gone: whether no process is left.
        running: MLflow runs that are said to run.
        epochs: that are done.
        checkpoints: on disk.
    """

    command: Command
    folder: Path
    seconds: float
    all_gone: bool
    running: list[str]
    epochs: list[dict[str, float]]
    checkpoints: list[Path]


@pytest.fixture(scope="module")
def interrupted(
    raygkd: Start, output: Path, teacher: dict[str, Any], trained: Trained
) -> Interrupted:
    given = (*TRAIN, "--teacher", teacher["model"], "--cache-mb", "0", "--output", output)
    command = raygkd(*given)

    def new_folders() -> list[Path]:
        found = set((output / "runs").glob("train-*")) - {trained.folder}
        return [folder for folder in found if journal(folder)]

    [folder] = command.until(new_folders)
    seconds = command.stop(signal.SIGINT)
    return Interrupted(
        command=command,
        folder=folder,
        seconds=seconds,
        all_gone=command.gone(10),
        running=running(MlflowClient(f"sqlite:///{output / 'mlflow.db'}")),
        epochs=journal(folder),
        checkpoints=list(folder.glob("train/checkpoint_*/checkpoint.pt")),
    )


@pytest.fixture(scope="module")
def resumed(raygkd: Start, interrupted: Interrupted) -> Command:
    """The interrupted run, brought to its end by the command that it printed."""
    [line] = [line for line in interrupted.command.err.splitlines() if line.startswith("stopped; ")]
    command = raygkd(*line.partition("raygkd ")[2].split())
    assert command.wait() == 0, command.err
    return command


def test_a_teacher_is_trained_alone(teacher: dict[str, Any], client: MlflowClient) -> None:
    row = teacher["models"]["teacher"]
    assert list(teacher["models"]) == ["teacher"]
    assert (row["model"], row["parameters"]) == ("resnet14", 175_258)
    run = client.get_run(teacher["mlflow"]["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.tags["raygkd.role"] == "teacher"
    found = curves(client, run.info.run_id)
    assert set(found) == EVERY_EPOCH | {"gradient_task", "test_score"}
    assert set(found["val_score"]) == {1, 2}
    assert found["val_score"][2] == teacher["val_score"]
    assert found["test_score"] == {2: row["test_score"]}


def test_two_workers_are_two_processes_with_random_states_of_their_own(trained: Trained) -> None:
    assert trained.command.most_at_once["ray::RayTrainWorker"] == 2
    [path] = trained.folder.glob("train/checkpoint_*/checkpoint.pt")
    states = [state["cpu"] for state in torch.load(path, weights_only=True)["rng"]]
    assert len(states) == 2
    assert not torch.equal(*states)


def test_the_result_holds_teacher_and_student(trained: Trained, teacher: dict[str, Any]) -> None:
    result = trained.result
    assert set(result) == {"models", "val_score", "mlflow", "run", "model", "seconds"}
    assert list(result["models"]) == ["teacher", "student"]
    assert result["models"]["teacher"] == teacher["models"]["teacher"]
    assert result["models"]["student"]["parameters"] == 78_042
    assert set(result["mlflow"]) == {"tracking_uri", "experiment_id", "run_id"}
    assert json.loads((trained.folder / "result.json").read_text()) == result


def test_a_teacher_that_is_given_is_used_and_no_other_is_trained(
    trained: Trained, teacher: dict[str, Any], output: Path
) -> None:
    assert "training teacher" not in trained.command.err
    assert trained.command.seen["ray::TrainController"] == 1
    assert not (output / "teachers").exists()
    stored = configuration.from_yaml((trained.folder / "config.yaml").read_text(), where="stored")
    assert stored.model.teacher == teacher["model"]


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
    terms = {f"loss_{term}" for term in GRAPH_TERMS}
    for name in EVERY_EPOCH | terms:
        assert set(found[name]) == set(range(1, EPOCHS + 1)), name
    first = {f"gradient_{term}" for term in ("task", *GRAPH_TERMS)}
    assert set(found) == EVERY_EPOCH | terms | first | {"test_score"}
    for epoch, metrics in enumerate(journal(trained.folder), start=1):
        assert {name: found[name][epoch] for name in metrics} == metrics
    assert all(value > 0 for name in TIMES for value in found[name].values())


def test_the_test_split_is_scored_once_for_the_final_model(
    trained: Trained, client: MlflowClient
) -> None:
    found = curves(client, trained.result["mlflow"]["run_id"])
    score = trained.result["models"]["student"]["test_score"]
    assert {name: found[name] for name in found if "test" in name} == {
        "test_score": {EPOCHS: score}
    }
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


def test_ctrl_c_ends_a_run_with_its_processes_and_its_record(interrupted: Interrupted) -> None:
    assert interrupted.command.wait() == 130, interrupted.command.err
    assert interrupted.seconds < 15
    assert interrupted.all_gone, interrupted.command.survivors()
    assert interrupted.running == []
    assert len(interrupted.epochs) in range(1, EPOCHS)
    assert len(interrupted.checkpoints) == 1
    assert interrupted.command.out == ""
    assert f"go on with: raygkd train --resume {interrupted.folder}\n" in interrupted.command.err
    assert "Traceback" not in interrupted.command.err


def test_streamed_images_train_as_images_in_memory_do(
    interrupted: Interrupted, trained: Trained
) -> None:
    # whom the stream of Ray Data reports to
    assert interrupted.command.seen["ray::_StatsActor"] == 1
    assert trained.command.seen["ray::_StatsActor"] == 0
    assert interrupted.epochs == journal(trained.folder)[: len(interrupted.epochs)]


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    resumed: Command, interrupted: Interrupted, trained: Trained, client: MlflowClient
) -> None:
    assert journal(interrupted.folder) == journal(trained.folder)
    result = json.loads((interrupted.folder / "result.json").read_text())
    assert result["models"] == trained.result["models"]
    found = curves(client, result["mlflow"]["run_id"])
    assert set(found["val_score"]) == set(range(1, EPOCHS + 1))
    assert client.get_run(result["mlflow"]["run_id"]).info.status == "FINISHED"


def test_without_json_the_result_is_a_table_and_where_to_look_next(
    resumed: Command, interrupted: Interrupted, trained: Trained, output: Path
) -> None:
    rows = [" ".join(line.split()) for line in resumed.out.splitlines()]
    for role, row in trained.result["models"].items():
        share = "100%" if role == "teacher" else "45%"
        size = f"{row['parameters']:,} {share} {row['test_score']:.4f}"
        assert f"{role} {row['model']} {size}" in rows
    assert f"model file {interrupted.folder / 'model.pt'}" in rows
    assert f"compare raygkd ui --output {output}" in rows


def test_no_run_is_left_open_and_no_number_is_strange(
    resumed: Command, client: MlflowClient, output: Path
) -> None:
    assert running(client) == []
    assert strange_numbers(output) == []
