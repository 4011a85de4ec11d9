"""A search whose MLflow server hangs: for a while, and until the search is over."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import Command
from mlflow import MlflowClient
from records import curves, running
from servers import Server

pytestmark = pytest.mark.slow
TRIALS = 3
TUNE = (
    *("tune", "--dataset", "digits", "--limit-train", "256", "--student", "resnet8"),
    *("--method", "none", "--seed", "3", "--trials", TRIALS, "--scheduler", "none"),
    *("--max-concurrent", "1"),
)
SHORT, LONG = 5, 40
# seconds; a request that is not answered takes this long, and ten where nothing is said
REQUEST_TIMEOUT = "2"
Start = Callable[..., Command]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server, not waited for yet: it takes seconds to start."""
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def tune(
    server: Server,
    raygkd: Start,
    untrained_teacher: Path,
    output: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[int], tuple[Command, Path]]]:
    """Return a function that starts a search of so many epochs; it gives the run's folder too.

    The server hangs as soon as the first epoch is in the search's journal.
    """
    server.wait()

    def start(epochs: int) -> tuple[Command, Path]:
        before = set(output.glob("runs/tune-*"))
        command = raygkd(
            *(*TUNE, "--epochs", epochs, "--teacher", untrained_teacher, "--output", output),
            *("--tracking-uri", server.uri, "--json"),
        )

        def one_epoch() -> list[Path]:
            found = set(output.glob("runs/tune-*/trials.jsonl"))
            journals = [path for path in found if path.parent not in before]
            return [path.parent for path in journals if '"metrics"' in path.read_text()]

        [folder] = command.until(one_epoch)
        server.pause()
        return command, folder

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", REQUEST_TIMEOUT)
        yield start


@dataclass(frozen=True)
class Hung:
    """A search whose server hung for a while.

    Attributes:
        over: trials that were over when it answered again.
    """

    command: Command
    folder: Path
    over: int
    result: dict[str, Any]


def outages(command: Command) -> list[str]:
    """Return the warnings that the server does not answer."""
    return [line for line in command.err.splitlines() if "does not answer" in line]


@pytest.fixture(scope="module")
def hung(tune: Callable[[int], tuple[Command, Path]], server: Server) -> Hung:
    """The server answers again after a trial and a warning."""
    command, folder = tune(LONG)
    shown = f"trials (1 at a time): 1/{TRIALS}"
    try:
        command.until(lambda: outages(command) and shown in command.err)
        over = command.err.count("trials (1 at a time): ") - 1
    finally:
        server.go_on()
    return Hung(command, folder, over, command.result())


@dataclass(frozen=True)
class Silent:
    """A search whose server hung until it was over, and its folder given to ``--resume`` later.

    Attributes:
        first, second: what the two commands printed.
        before, after: the run's files of training -> when they were written last.
    """

    command: Command
    folder: Path
    first: dict[str, Any]
    second: dict[str, Any]
    before: dict[Path, int]
    after: dict[Path, int]


def trained(folder: Path) -> dict[Path, int]:
    """Return what training writes -> when it was written last."""
    paths = [folder / "trials.jsonl", *folder.rglob("checkpoint.pt")]
    return {path: path.stat().st_mtime_ns for path in paths}


@pytest.fixture(scope="module")
def silent(tune: Callable[[int], tuple[Command, Path]], server: Server, raygkd: Start) -> Silent:
    command, folder = tune(SHORT)
    try:
        first = command.result()
    finally:
        server.go_on()
    before = trained(folder)
    second = raygkd("tune", "--resume", folder, "--json").result()
    return Silent(command, folder, first, second, before, trained(folder))


def check_record(result: dict[str, Any], server: Server, epochs: int) -> None:
    """MLflow has what a result says, everything once, and no other run of that search."""
    client = MlflowClient(server.uri, server.uri)
    place = result["mlflow"]
    parent = f"tags.`mlflow.parentRunId` = '{place['parent_run_id']}'"
    children = client.search_runs([place["experiment_id"]], parent)
    trials = {trial["run_id"]: trial for trial in result["trials"]}
    assert sorted(run.info.run_id for run in children) == sorted(trials)
    for run in children:
        trial = trials[run.info.run_id]
        assert run.data.params == {name: str(value) for name, value in trial["params"].items()}
        scores = curves(client, run.info.run_id)["val_score"]
        assert set(scores) == set(range(1, epochs + 1))
        assert scores[epochs] == trial["val_score"]
    metrics = client.get_run(place["parent_run_id"]).data.metrics
    assert metrics["best_test_score"] == result["best"]["test_score"]
    registered = result["best"]["registered"]
    version = client.get_model_version(registered["name"], registered["version"])
    assert version.run_id == place["parent_run_id"]
    assert running(client) == []


def test_a_search_goes_on_while_its_server_hangs(hung: Hung, server: Server) -> None:
    assert hung.over >= 1
    [warning] = outages(hung.command)
    assert warning.startswith(f"warning: MLflow at {server.uri} does not answer (")
    assert warning.endswith(f"everything is kept in {hung.folder}/tracking.jsonl")
    assert hung.command.err.count("warning: ") == 1
    assert "Traceback" not in hung.command.err


def test_a_server_that_answers_again_has_everything_once(hung: Hung, server: Server) -> None:
    check_record(hung.result, server, LONG)
    assert json.loads((hung.folder / "result.json").read_text()) == hung.result


def test_a_search_ends_although_its_server_hangs(silent: Silent, server: Server) -> None:
    outage, model, end = [
        line for line in silent.command.err.splitlines() if line.startswith("warning: ")
    ]
    assert outage.startswith(f"warning: MLflow at {server.uri} does not answer (")
    assert model.startswith(f"warning: MLflow at {server.uri} has no model of run 'search': ")
    assert end == (
        f"warning: MLflow at {server.uri} has not taken everything; it is kept in "
        f"{silent.folder}/tracking.jsonl and is sent when this run is resumed"
    )
    assert silent.first["best"]["registered"] is None
    assert "Traceback" not in silent.command.err


def test_the_folder_of_a_finished_search_sends_what_is_left(silent: Silent, server: Server) -> None:
    assert silent.after == silent.before
    for name in ("number", "params", "epochs", "val_score", "status"):
        told = [trial[name] for trial in silent.second["trials"]]
        assert told == [trial[name] for trial in silent.first["trials"]]
    assert silent.second["best"]["test_score"] == silent.first["best"]["test_score"]
    check_record(silent.second, server, SHORT)
