"""Jobs on a cluster of three nodes, of which some are lost: what became of them."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from records import (
    configuration_of,
    curves,
    images_of,
    plain_training,
    rescored,
    run_ids,
    running,
)
from spreading import EPOCHS, TRIALS, Spread

from raygkd.config import with_settings
from raygkd.engine import run_epoch

# the first test waits for the scene, which alone and on a busy machine takes longer than a test may
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def outcome(scenes: Mapping[str, Future[Any]]) -> Spread:
    return scenes["spread"].result()


@pytest.fixture(scope="module")
def server(outcome: Spread) -> MlflowClient:
    # the server was outside of the nodes' network, which is gone
    return MlflowClient(f"sqlite:///{outcome.server.folder}/mlflow.db")


def test_ranks_on_two_nodes_have_equal_gradients_and_weights(outcome: Spread) -> None:
    first, second = outcome.ranks
    assert {first["node"], second["node"]} == set(outcome.nodes)
    assert first["images"] != second["images"]
    assert first["weights before"] != first["weights"]
    for what in ("weights before", "gradients", "weights"):
        assert first[what] == second[what], what


def test_an_elastic_run_shrinks_with_a_lost_node_and_grows_with_a_new_one(outcome: Spread) -> None:
    changes = [outcome.elastic[0]]
    for workers in outcome.elastic:
        changes += [workers] if workers != changes[-1] else []
    # the first epochs may have been trained by one, before the second process had started
    assert changes[-3:] == [2.0, 1.0, 2.0]
    assert "is lost: its runs resume after their last epoch" in outcome.log
    assert "has joined" in outcome.log


def test_a_run_that_needs_all_nodes_waits_for_the_one_it_has_lost(
    outcome: Spread, server: MlflowClient
) -> None:
    assert set(outcome.fixed) == {2.0}
    run = run_ids(outcome.output / "runs" / "train-fixed")["student"]
    assert list(curves(server, run)["epoch"]) == list(range(1, len(outcome.fixed) + 1))


def test_no_epoch_of_an_elastic_run_is_told_twice_or_not_at_all(
    outcome: Spread, server: MlflowClient
) -> None:
    run = run_ids(outcome.output / "runs" / "train-elastic")["student"]
    epochs = curves(server, run)["epoch"]
    assert list(epochs) == list(range(1, len(outcome.elastic) + 1))


def test_a_stopped_job_says_so_and_leaves_nothing(outcome: Spread, server: MlflowClient) -> None:
    """Its first client had been killed, which did not end it."""
    assert outcome.code == 130
    assert "stopped; resume with: raygkd train --resume" in outcome.log
    assert outcome.left == []
    run = run_ids(outcome.output / "runs" / "train-elastic")["student"]
    assert server.get_run(run).info.status == "KILLED"


def test_the_load_of_every_node_is_recorded(outcome: Spread, server: MlflowClient) -> None:
    run = run_ids(outcome.output / "runs" / "train-elastic")["student"]
    metrics = server.get_run(run).data.metrics
    for address in outcome.nodes:
        assert 0.0 <= metrics[f"system/{address}/cpu_utilization_percentage"] <= 100.0
        assert 0.0 < metrics[f"system/{address}/system_memory_usage_percentage"] <= 100.0
        assert metrics[f"system/{address}/network_transmit_megabytes"] >= 0.0


def test_a_search_that_is_submitted_again_goes_on(outcome: Spread) -> None:
    trials = outcome.search["trials"]
    assert [(trial["status"], trial["epochs"]) for trial in trials] == [
        ("finished", EPOCHS)
    ] * TRIALS
    for trial, epochs in outcome.killed.items():
        assert epochs < outcome.lost[trial] < EPOCHS


def test_a_search_has_a_trial_on_every_node(outcome: Spread) -> None:
    assert outcome.at_work == [1, 1, 1]


def test_the_trial_of_a_lost_node_goes_on_after_its_last_epoch(outcome: Spread) -> None:
    number, epoch = lost_trial(outcome)
    assert epoch >= outcome.lost[number]


def lost_trial(outcome: Spread) -> tuple[int, int]:
    """Return the trial whose node was lost, and the epoch after which it went on."""
    [line] = [line for line in outcome.search_log.splitlines() if "lost its process" in line]
    [number] = [number for number in outcome.lost if f"trial {number} lost" in line]
    assert "it resumes after epoch" in line
    return number, int(line.rpartition(" ")[2])


def test_models_are_scored_where_there_is_a_gpu(outcome: Spread) -> None:
    run = Path(outcome.search["run"])
    best = outcome.search["best"]
    assert best["test_score"] == rescored(run / "model.pt", run, "test")["score"]


def test_a_trial_learns_what_it_does_without_the_losses(
    outcome: Spread, server: MlflowClient
) -> None:
    number, epoch = lost_trial(outcome)
    [trial] = [trial for trial in outcome.search["trials"] if trial["number"] == number]
    searched = configuration_of(Path(outcome.search["run"]))
    training = plain_training(with_settings(searched, trial["params"]), images_of(searched), None)
    expected = [run_epoch(training)["val_score"] for _ in range(epoch + 3)]
    scores = curves(server, trial["run_id"])["val_score"]
    assert list(scores) == list(range(1, EPOCHS + 1))
    assert list(scores.values())[: len(expected)] == expected


def test_no_run_is_left_running(server: MlflowClient) -> None:
    assert running(server) == []


def test_an_output_folder_that_a_node_does_not_see_is_refused(outcome: Spread) -> None:
    if outcome.refused is None:
        pytest.skip("to hide a folder from a node takes network and mount namespaces")
    code, log = outcome.refused
    assert code == 2
    [line] = [line for line in log.splitlines() if line.startswith("error:")]
    assert f"--output {outcome.output}: node 198.18." in line
    assert "choose a path on storage that all nodes share" in line


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "no token",
            "rejects this machine's token; set RAY_AUTH_MODE=token and RAY_AUTH_TOK",
        ),
        ("wrong token", "rejects this machine's token; set RAY_AUTH_MODE=token and RAY_AUTH"),
        ("no job", "no job gone; the latest are: raysubmit_"),
        ("large", "large.pth: a job can upload at most 10 MiB and this one has 12."),
    ],
)
def test_what_cannot_be_sent_is_refused_in_a_line(outcome: Spread, name: str, words: str) -> None:
    code, error = outcome.mistakes[name]
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error


def test_a_job_is_sent_with_the_package_alone(outcome: Spread) -> None:
    # the code, and the page of a report
    assert {path.suffix for path in outcome.sent} == {".py", ".html", ".typed"}
    assert {path.parts[path.parts.index("raygkd") - 1][:8] for path in outcome.sent} == {"_ray_pkg"}


def test_no_secret_is_written_anywhere(outcome: Spread) -> None:
    """Neither by Ray nor by MLflow, on the nodes, in the output, or with what was submitted."""
    assert outcome.found == []
