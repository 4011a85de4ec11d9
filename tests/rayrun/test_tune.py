"""``raygkd tune`` from end to end: a search, and one that is stopped and resumed."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from commands import Command
from mlflow import MlflowClient
from mlflow.entities import Run
from records import (
    EVERY_EPOCH,
    configuration_of,
    curves,
    rescored,
    run_ids,
    running,
    strange_numbers,
    tracked,
    whole_split,
)

from raygkd import config as configuration
from raygkd.assembly.derived_configs import student_alone
from raygkd.deploy.modules import DeployedClassifier
from raygkd.models import load_model_file
from raygkd.tracking.store import default_uri

TUNE = (
    *("tune", "--dataset", "digits", "--limit-train", "512", "--seed", "3"),
    *("--teacher", "resnet14", "--student", "resnet8", "--teacher-epochs", "3"),
    *("--batch-size", "32"),
)
EPOCHS, TRIALS = 3, 4
KD = {"lr", "method", "kd_temperature", "kd_weight"}
SEARCHED = {"lr", "levels", "temperature", "dim", "alpha", "beta", "gamma"}
# of the terms, where their weight is not 0
WEIGHTS = {"alpha": "vertex", "beta": "edge", "gamma": "spectral"}
TERMS = {f"{kind}_{term}" for term in WEIGHTS.values() for kind in ("loss", "factor")}
CHANCE = 0.1
# of the search that is stopped: of four trials the second and the last cannot learn
SPACE = """
lr: {choice: [1.0e+30, 0.03, 0.04, 0.05]}
alpha: {loguniform: [0.1, 1.0]}
"""
LONGER, STOPPED_TRIALS = 4, 4
Start = Callable[..., Command]


@dataclass(frozen=True)
class Searched:
    """A search from beginning to end.

    Attributes:
        champion: the version of the registered model that had the alias when it ended.
    """

    command: Command
    result: dict[str, Any]
    champion: Any

    @property
    def folder(self) -> Path:
        return Path(self.result["run"])


def store(output: Path) -> MlflowClient:
    """Return the MLflow store of an output folder."""
    return MlflowClient(default_uri(output), default_uri(output))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which no other search has registered a model."""
    return tmp_path_factory.mktemp("searches")


@pytest.fixture(scope="module")
def searched(raygkd: Start, output: Path) -> Searched:
    budget = ("--trials", TRIALS, "--epochs", EPOCHS, "--reduction-factor", "2")
    command = raygkd(*TUNE, *budget, "--output", output, "--json")
    result = command.result()
    name = result["champion"]["registered"]["name"]
    return Searched(command, result, store(output).get_model_version_by_alias(name, "champion"))


def children(client: MlflowClient, result: Mapping[str, Any], role: str) -> dict[str, Run]:
    """Return MLflow run id -> run of the children of a search that have a role."""
    place = result["mlflow"]
    parent = f"tags.`mlflow.parentRunId` = '{place['parent_run_id']}'"
    runs = client.search_runs([place["experiment_id"]], parent)
    return {run.info.run_id: run for run in runs if run.data.tags["raygkd.role"] == role}


# a search from beginning to end


def test_the_result_is_what_the_command_promises(searched: Searched, output: Path) -> None:
    result = searched.result
    best, trials = result["best"], result["trials"]
    assert {"params", "val_score", "test_score", "epochs", "model_uri"} <= set(best)
    for role, parameters in (("teacher", 175_258), ("student_alone", 78_042)):
        assert result[role]["parameters"] == parameters
        assert 0 <= result[role]["test_score"] <= 1
    assert [set(trial) for trial in trials] == TRIALS * [
        {"number", "params", "epochs", "val_score", "status", "run_id", "error"}
    ]
    assert set(result["mlflow"]) == {"tracking_uri", "experiment_id", "parent_run_id"}
    assert result["mlflow"]["tracking_uri"] == default_uri(output)
    assert result["seconds"] > 0
    assert result["repeat"] is None
    assert json.loads((searched.folder / "result.json").read_text()) == result


def test_how_the_winner_was_chosen_is_told_with_what_it_cost(
    searched: Searched, client: MlflowClient
) -> None:
    selection = dict(searched.result["selection"])
    trained = sum(trial["epochs"] for trial in searched.result["trials"])
    assert 0 < selection.pop("seconds") < searched.result["seconds"]
    assert 0 < selection.pop("first_step_seconds") < searched.result["seconds"]
    assert selection == {
        "rule": "highest validation score after the last epoch trained",
        **{
            "score": "accuracy",
            "split": "val",
            "trials": TRIALS,
            "epochs": EPOCHS,
            "trained_epochs": trained,
        },
        **{"scheduler": "asha", "searcher": "random"},
    }
    tags = client.get_run(searched.result["mlflow"]["parent_run_id"]).data.tags
    for name, value in searched.result["selection"].items():
        assert tags[f"selection.{name}"] == str(value)
    best = searched.result["best"]
    row = f"| best | {best['model']} | {best['parameters']:,} | {best['test_score']:.4f} |"
    assert row in tags["mlflow.note.content"].splitlines()


def test_trials_are_ranked_and_the_best_is_the_best_on_validation(searched: Searched) -> None:
    best, trials = searched.result["best"], searched.result["trials"]
    scores = [trial["val_score"] for trial in trials]
    assert scores == sorted(scores, reverse=True)
    assert {name: best[name] for name in ("params", "val_score", "epochs")} == {
        name: trials[0][name] for name in ("params", "val_score", "epochs")
    }
    assert len({json.dumps(trial["params"]) for trial in trials}) == TRIALS


def test_the_first_trials_are_the_default_settings_and_kd(searched: Searched) -> None:
    first, second = (
        dict(one["params"])
        for number in (0, 1)
        for one in searched.result["trials"]
        if one["number"] == number
    )
    config = configuration_of(searched.folder)
    assert first.pop("levels") == [1, 2, 3]
    assert first == {name: configuration.value_of(config, name) for name in first}
    assert second == {
        "lr": config.optim.lr,
        "method": "kd",
        "kd_temperature": 4.0,
        "kd_weight": 0.9,
    }


def test_the_verdict_is_of_both_students_on_every_test_image(
    searched: Searched, client: MlflowClient
) -> None:
    result = searched.result
    pixels, labels = (torch.from_numpy(array) for array in whole_split(searched.folder, "test"))
    files = {role: model_of(searched, role) for role in ("best", "student_alone")}
    with torch.no_grad():
        right = {
            role: (DeployedClassifier(load_model_file(path))(pixels).argmax(1) == labels).double()
            for role, path in files.items()
        }
    differences = right["best"] - right["student_alone"]
    told = result["verdict"]
    assert (told["images"], told["seeds"]) == (len(labels), 1)
    assert told["difference"] == pytest.approx(float(differences.mean()))
    error = float(differences.std() / len(labels) ** 0.5)
    assert told["standard_error"] == pytest.approx(error)
    assert (told["outcome"] == "no different") == (abs(told["difference"]) <= 2 * error)
    run = client.get_run(result["mlflow"]["parent_run_id"]).data
    assert run.tags["verdict"] == told["line"]
    assert run.metrics["verdict_difference"] == pytest.approx(told["difference"])
    assert run.metrics["verdict_standard_error"] == pytest.approx(error)
    assert told["line"] in run.tags["mlflow.note.content"]


def model_of(searched: Searched, role: str) -> Path:
    """Return the model file of the best trial or of the student alone."""
    if role == "student_alone":
        return searched.folder / "student-alone" / "model.pt"
    beaten = searched.folder / "best-student" / "model.pt"
    return beaten if beaten.exists() else searched.folder / "model.pt"


def test_the_champion_is_the_student_that_validation_ranks_first(
    searched: Searched, client: MlflowClient
) -> None:
    result = searched.result
    champion = result["champion"]
    scores = {
        role: rescored(model_of(searched, role), searched.folder, "val")["score"]
        for role in ("best", "student_alone")
    }
    alone_is_ahead = scores["student_alone"] > scores["best"]
    assert champion["role"] == ("student_alone" if alone_is_ahead else "best")
    assert champion["val_score"] == scores[champion["role"]]
    tags = searched.champion.tags
    assert tags["raygkd.champion"] == champion["role"]
    assert tags["val_score"] == str(champion["val_score"])
    other = {"best": "student_alone", "student_alone": "best"}[champion["role"]]
    assert champion["beaten"] == scores[other]
    assert (result["best"]["registered"] is None) == alone_is_ahead


def test_asha_stops_trials_that_fall_behind(searched: Searched) -> None:
    epochs: dict[str, list[int]] = {"finished": [], "stopped": []}
    for trial in searched.result["trials"]:
        epochs[trial["status"]].append(trial["epochs"])
        assert set(trial["params"]) == (KD if trial["number"] == 1 else SEARCHED)
    assert set(epochs["finished"]) == {EPOCHS}
    assert epochs["stopped"]
    assert set(epochs["stopped"]) <= set(range(1, EPOCHS))


def test_the_tuned_student_is_what_its_scores_say(searched: Searched) -> None:
    best, model = searched.result["best"], model_of(searched, "best")
    assert load_model_file(model).name == "resnet8"
    assert rescored(model, searched.folder, "val")["score"] == best["val_score"]
    assert rescored(model, searched.folder, "test")["score"] == best["test_score"]
    assert best["test_score"] > 3 * CHANCE
    champion = searched.result["champion"]["role"]
    of_run = rescored(Path(searched.result["model"]), searched.folder, "test")["score"]
    assert of_run == searched.result[champion]["test_score"]


def test_a_search_is_a_run_and_its_trials_are_children(
    searched: Searched, client: MlflowClient
) -> None:
    trials = children(client, searched.result, "trial")
    assert set(trials) == {trial["run_id"] for trial in searched.result["trials"]}
    assert len(children(client, searched.result, "teacher")) == 1
    assert len(children(client, searched.result, "student-alone")) == 1
    parent = client.get_run(searched.result["mlflow"]["parent_run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["raygkd.split"] == "train 512, val 144, test 359"
    for run in trials.values():
        assert run.info.status == "FINISHED"
        assert {"raygkd.split", "version.torch", "version.ray"} <= set(run.data.tags)


def test_parameters_of_a_trial_are_what_was_searched_and_a_file_has_the_rest(
    searched: Searched, client: MlflowClient, tmp_path: Path
) -> None:
    whole = configuration_of(searched.folder)
    for trial in searched.result["trials"]:
        run = client.get_run(trial["run_id"])
        assert run.data.params == {name: str(value) for name, value in trial["params"].items()}
        text = Path(client.download_artifacts(run.info.run_id, "config.yaml", str(tmp_path)))
        config = configuration.from_yaml(text.read_text(), where="artifact")
        assert config == configuration.with_settings(whole, trial["params"])


def test_the_student_alone_trains_as_the_best_trial_but_without_a_teacher(
    searched: Searched, client: MlflowClient, tmp_path: Path
) -> None:
    [run_id] = children(client, searched.result, "student-alone")
    text = Path(client.download_artifacts(run_id, "config.yaml", str(tmp_path)))
    config = configuration.from_yaml(text.read_text(), where="artifact")
    whole = configuration_of(searched.folder)
    assert config == student_alone(whole, searched.result["best"]["params"])
    assert config.optim.lr == searched.result["best"]["params"]["lr"]
    found = curves(client, run_id)
    assert set(found["val_score"]) == set(range(1, EPOCHS + 1))
    assert not TERMS & set(found)


def test_every_trial_has_every_term_of_every_epoch(
    searched: Searched, client: MlflowClient
) -> None:
    for trial in searched.result["trials"]:
        found = curves(client, trial["run_id"])
        used = [term for weight, term in WEIGHTS.items() if trial["params"].get(weight)]
        terms = {f"{kind}_{term}" for term in used for kind in ("loss", "factor")}
        assert terms == TERMS & set(found)
        for name in EVERY_EPOCH | terms | {"diverged"}:
            assert set(found[name]) == set(range(1, trial["epochs"] + 1)), name
        assert found["val_score"][trial["epochs"]] == trial["val_score"]
        assert set(found["first_step_seconds"]) == {1}
        assert not [name for name in found if "test" in name]


def test_the_parent_compares_the_three_models(searched: Searched, client: MlflowClient) -> None:
    found = client.get_run(searched.result["mlflow"]["parent_run_id"]).data.metrics
    for role in ("best", "teacher", "student_alone"):
        for name in ("test_score", "parameters"):
            assert found[f"{role}_{name}"] == searched.result[role][name]


def test_a_search_is_drawn_for_its_folder_and_mlflow(
    searched: Searched, client: MlflowClient, tmp_path: Path
) -> None:
    run_id = searched.result["mlflow"]["parent_run_id"]
    sent = Path(client.download_artifacts(run_id, "search.png", str(tmp_path))).read_bytes()
    assert sent == (searched.folder / "search.png").read_bytes()
    assert sent.startswith(b"\x89PNG")


def test_the_winner_is_a_registered_model_that_scores_the_same(
    searched: Searched, client: MlflowClient
) -> None:
    champion = searched.result["champion"]
    assert str(searched.champion.version) == champion["registered"]["version"]
    assert searched.champion.run_id == searched.result["mlflow"]["parent_run_id"]
    pixels, labels = whole_split(searched.folder, "test")
    logits = mlflow.pyfunc.load_model(champion["model_uri"]).predict(pixels)
    score = searched.result[champion["role"]]["test_score"]
    assert np.mean(np.argmax(logits, axis=1) == labels) == score
    by_alias = mlflow.pyfunc.load_model(
        f"models:/{searched.champion.name}/{searched.champion.version}"
    )
    assert np.array_equal(by_alias.predict(pixels[:8]), logits[:8])


# a search that is stopped by SIGTERM in its third trial, and resumed


@dataclass(frozen=True)
class Stopped:
    """A search after SIGTERM in the middle.

    Attributes:
        seconds: from the signal to the end.
        all_gone: whether no process is left.
        running: MLflow runs that are said to run.
        run_ids: trial -> MLflow run.
        over: trials that were over.
        epochs: trial -> how many epochs were logged.
        order: "start" and "end" of trials as they came.
    """

    command: Command
    folder: Path
    seconds: float
    all_gone: bool
    running: list[str]
    run_ids: dict[str, str]
    over: set[str]
    epochs: dict[str, int]
    order: list[str]


def is_of_trial(entry: Mapping[str, Any], *operations: str) -> bool:
    """Return whether an entry of the journal is one of some operations on a trial's run."""
    others = ("search", "teacher", "student-alone")
    return entry.get("op") in operations and entry["key"] not in others


def logged(folder: Path, operation: str) -> list[str]:
    """Return the trials that an operation was recorded of, in order."""
    return [entry["key"] for entry in tracked(folder) if is_of_trial(entry, operation)]


@pytest.fixture(scope="module")
def stopped(raygkd: Start, output: Path, searched: Searched, tmp_path_factory: Any) -> Stopped:
    space = tmp_path_factory.mktemp("space") / "space.yaml"
    space.write_text(SPACE)
    before = set((output / "runs").glob("tune-*"))
    budget = ("--trials", STOPPED_TRIALS, "--epochs", LONGER, "--grace-period", LONGER)
    command = raygkd(
        *(*TUNE, *budget, "--max-concurrent", "1", "--space", space, "--output", output),
        *("--searcher", "tpe"),
    )

    def third_trial() -> list[Path]:
        found = set((output / "runs").glob("tune-*")) - before
        return [folder for folder in found if len(set(logged(folder, "metrics"))) == 3]

    [folder] = command.until(third_trial)
    seconds = command.stop(signal.SIGTERM)
    gone = command.gone(10)
    entries = tracked(folder)
    metrics, ended = logged(folder, "metrics"), logged(folder, "end")
    return Stopped(
        command=command,
        folder=folder,
        seconds=seconds,
        all_gone=gone,
        running=running(store(output)),
        run_ids=run_ids(folder),
        over=set(ended[:2]),
        epochs={trial: metrics.count(trial) for trial in metrics},
        order=[entry["op"] for entry in entries if is_of_trial(entry, "start", "end")],
    )


@dataclass(frozen=True)
class Resumed:
    """The stopped search, brought to its end."""

    command: Command
    result: dict[str, Any]


@pytest.fixture(scope="module")
def resumed(raygkd: Start, stopped: Stopped) -> Resumed:
    command = raygkd("tune", "--resume", stopped.folder)
    assert command.wait() == 0, command.err
    return Resumed(command, json.loads((stopped.folder / "result.json").read_text()))


def test_the_teacher_of_an_earlier_search_is_used_again(stopped: Stopped, output: Path) -> None:
    assert "teacher resnet14: reused from an earlier run" in stopped.command.err
    assert "training teacher" not in stopped.command.err
    assert "teacher" not in stopped.run_ids
    assert len(list((output / "teachers").iterdir())) == 1


def test_the_number_of_trials_at_once_can_be_lowered(stopped: Stopped) -> None:
    assert "trials (1 at a time): 0/4" in stopped.command.err
    assert stopped.order == ["start", "end"] * 3


def test_sigterm_ends_a_search_with_its_processes_and_its_record(stopped: Stopped) -> None:
    assert stopped.command.wait() == 130, stopped.command.err
    assert stopped.seconds < 15
    assert stopped.all_gone, stopped.command.survivors()
    assert stopped.running == []
    assert f"resume with: raygkd tune --resume {stopped.folder}\n" in stopped.command.err
    assert "Traceback" not in stopped.command.err
    assert not (stopped.folder / "result.json").exists()


def test_a_resumed_search_goes_on_in_its_runs_and_repeats_no_trial(
    stopped: Stopped, resumed: Resumed, client: MlflowClient
) -> None:
    trials = resumed.result["trials"]
    runs = {trial["run_id"]: trial for trial in trials}
    assert len(runs) == STOPPED_TRIALS
    assert {stopped.run_ids[key] for key in stopped.epochs} <= set(runs)
    assert resumed.result["mlflow"]["parent_run_id"] == stopped.run_ids["search"]
    metrics = logged(stopped.folder, "metrics")
    for key in stopped.over:
        assert metrics.count(key) == stopped.epochs[key]
    for run_id, trial in runs.items():
        assert client.get_run(run_id).info.status == "FINISHED"
        assert set(curves(client, run_id)["val_score"]) == set(range(1, trial["epochs"] + 1))


def test_a_diverging_trial_ends_alone_and_last(resumed: Resumed, client: MlflowClient) -> None:
    trials = resumed.result["trials"]
    diverging = [trial for trial in trials if trial["params"]["lr"] > 1]
    assert 1 <= len(diverging) < STOPPED_TRIALS
    assert trials[-len(diverging) :] == diverging
    for trial in trials:
        status = "diverged" if trial in diverging else "finished"
        assert trial["status"] == status
        assert trial["epochs"] == (1 if trial in diverging else LONGER)
    assert resumed.result["best"]["params"] == trials[0]["params"]
    assert curves(client, diverging[0]["run_id"])["diverged"] == {1: 1.0}


def test_the_winner_of_a_later_search_challenges_that_of_the_first(
    searched: Searched, resumed: Resumed, client: MlflowClient, output: Path, raygkd: Start
) -> None:
    best = resumed.result["champion"]
    test_score = resumed.result[best["role"]]["test_score"]
    name, version = best["registered"]["name"], best["registered"]["version"]
    held = {a: str(v) for a, v in client.get_registered_model(name).aliases.items()}
    assert held == {"champion": str(searched.champion.version), "challenger": version}
    row = f"registered models:/{name}@challenger, version {version}"
    assert row in " ".join(resumed.command.out.split())
    challenger = client.get_model_version(name, version)
    assert challenger.tags["val_score"] == str(best["val_score"])
    assert challenger.tags[f"{best['role']}_test_score"] == str(test_score)
    assert challenger.run_id == resumed.result["mlflow"]["parent_run_id"]
    assert "Best settings: " in challenger.description
    compared = raygkd("promote", name, "--output", output, "--json").result()
    # the same images as those that the two searches have scored at their ends
    scores = {role: one["test_score"] for role, one in compared["versions"].items()}
    first = searched.result[searched.result["champion"]["role"]]["test_score"]
    assert scores == {"champion": first, "challenger": test_score}
    assert compared["promoted"] == (test_score > first)
    assert compared["same_splits"]


def test_without_json_a_search_ends_with_tables(resumed: Resumed, output: Path) -> None:
    rows = [" ".join(line.split()) for line in resumed.command.out.splitlines()]
    for rank, trial in enumerate(resumed.result["trials"], start=1):
        head = f"{rank} {trial['val_score']:.4f} {trial['epochs']} {trial['status']} lr="
        assert [row for row in rows if row.startswith(head)]
    names = {"teacher": "teacher", "student_alone": "student alone", "best": "best student"}
    for key, name in names.items():
        row = resumed.result[key]
        share = "100%" if key == "teacher" else "45%"
        size = f"{row['parameters']:,} {share} {row['test_score']:.4f}"
        assert f"{name} {row['model']} {size}" in rows
    assert f"compare raygkd ui --output {output}" in rows
    assert rows[-1] == resumed.result["verdict"]["line"]
    told = [row for row in rows if row.startswith("The student alone is the champion: ")]
    assert len(told) == (resumed.result["champion"]["role"] == "student_alone")


def test_no_run_is_left_open_and_no_number_is_strange(
    resumed: Resumed, client: MlflowClient, output: Path
) -> None:
    assert running(client) == []
    assert strange_numbers(output) == []
