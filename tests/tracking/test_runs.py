"""What a tracker records in a SQLite store, what it leaves out, and what it takes up again."""

from __future__ import annotations

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType

from raygkd.errors import DataError, TrackingError
from raygkd.tracking.journal_entries import read_journal
from raygkd.tracking.store import connect, default_uri
from raygkd.tracking.tags import PARENT_TAG
from raygkd.tracking.tracker import Tracker


def runs(client: MlflowClient, experiment: str) -> dict[str, Run]:
    """Return name -> run; a name that two runs have is an error."""
    found = client.search_runs([experiment], run_view_type=ViewType.ALL)
    named = {run.info.run_name: run for run in found}
    assert len(named) == len(found)
    return named


def history(client: MlflowClient, run_id: str | None, name: str) -> list[tuple[int, float]]:
    points = client.get_metric_history(run_id, name)
    return sorted((point.step, point.value) for point in points)


def entries(path: Path, kind: str) -> list[dict]:
    return [entry for entry in read_journal(path) if kind in entry]


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("raygkd.tracking")
    ]


def test_runs_with_settings_facts_curves_and_files(
    tracker: Tracker, client: MlflowClient, experiment: str
) -> None:
    tracker.start("search", "the search", tags={"raygkd.role": "search"})
    tracker.start("t1", "trial", parent="search", params={"lr": 0.1}, texts={"config.yaml": "a: 1"})
    for epoch in (1, 2, 3):
        tracker.metrics("t1", {"loss": 1.0 / epoch, "val_score": epoch}, step=epoch)
    tracker.tags("search", {"best.lr": "0.1"})
    tracker.end("t1")
    tracker.close()

    found = runs(client, experiment)
    search, trial = found["the search"], found["trial"]
    assert trial.data.tags[PARENT_TAG] == search.info.run_id == tracker.run_id("search")
    assert trial.data.params == {"lr": "0.1"}
    assert search.data.tags["raygkd.role"] == "search"
    assert search.data.tags["best.lr"] == "0.1"
    assert history(client, trial.info.run_id, "loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    folder = unquote(trial.info.artifact_uri.removeprefix("file://"))
    assert Path(folder, "config.yaml").read_text() == "a: 1"
    assert {run.info.status for run in found.values()} == {"FINISHED"}


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_closing_ends_the_open_runs_with_its_status(
    tracker: Tracker, client: MlflowClient, experiment: str, status: str
) -> None:
    tracker.start("ended", "ended")
    tracker.end("ended", "FINISHED")
    tracker.start("open", "open")
    tracker.close(status)
    found = runs(client, experiment)
    assert found["ended"].info.status == "FINISHED"
    assert found["open"].info.status == status


def test_what_is_not_finite_is_never_sent(
    tracker: Tracker, client: MlflowClient, tmp_path: Path
) -> None:
    tracker.start("run", "run")
    tracker.metrics("run", {"loss": math.nan, "score": 0.5, "norm": math.inf}, step=1)
    tracker.metrics("run", {"loss": math.nan, "norm": -math.inf}, step=2)
    tracker.metrics("run", {}, step=3)
    tracker.close()
    assert client.get_run(tracker.run_id("run")).data.metrics == {"score": 0.5}
    written = entries(tmp_path / "journal.jsonl", "values")
    assert [entry["step"] for entry in written] == [1]


# resuming


def test_resumed_runs_go_on_and_end(
    tracker: Tracker, uri: str, client: MlflowClient, experiment: str, tmp_path: Path
) -> None:
    tracker.start("run", "run", params={"lr": 0.1})
    tracker.metrics("run", {"loss": 3.0}, step=1)
    tracker.metrics("run", {"loss": 2.0}, step=2)
    tracker.close("KILLED")
    run_id = tracker.run_id("run")

    resumed = Tracker(uri, experiment, tmp_path / "journal.jsonl")
    assert resumed.run_id("run") == run_id
    resumed.start("run", "run", params={"lr": 0.1})
    resumed.start("mark", "mark")
    assert resumed.run_id("mark") is not None
    assert client.get_run(run_id).info.status == "RUNNING"
    resumed.metrics("run", {"loss": 2.0}, step=2)
    resumed.metrics("run", {"loss": 1.0}, step=3)
    resumed.close()
    assert client.get_run(run_id).info.status == "FINISHED"
    assert history(client, run_id, "loss") == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert len(runs(client, experiment)) == 2


def test_an_answer_that_was_lost_makes_nothing_twice(
    tracker: Tracker, uri: str, client: MlflowClient, experiment: str, tmp_path: Path
) -> None:
    """Everything has reached MLflow, and the journal knows nothing of it."""
    tracker.start("run", "run", params={"lr": 0.1})
    tracker.metrics("run", {"loss": 3.0}, step=1)
    tracker.close()
    operations = entries(tmp_path / "journal.jsonl", "op")
    journal = tmp_path / "unanswered.jsonl"
    journal.write_text("".join(json.dumps(entry) + "\n" for entry in operations))

    again = Tracker(uri, experiment, journal)
    again.close()
    assert again.run_id("run") == tracker.run_id("run")
    assert len(runs(client, experiment)) == 1
    points = client.get_metric_history(again.run_id("run"), "loss")
    assert [(point.step, point.value) for point in points] == [(1, 3.0)]
    assert len(entries(journal, "sent")) == len(operations)


def test_a_run_that_nobody_opens_again_is_closed(
    uri: str, client: MlflowClient, experiment: str, tmp_path: Path
) -> None:
    """A trial that was over when its process died before it told so."""
    journal = tmp_path / "journal.jsonl"
    first = Tracker(uri, experiment, journal)
    first.start("trial", "trial")
    run_id = first.run_id("trial")
    # the first process ends here, without close
    assert client.get_run(run_id).info.status == "RUNNING"
    Tracker(uri, experiment, journal).close("FAILED")
    assert client.get_run(run_id).info.status == "FAILED"
    first.close()


def test_a_line_that_a_crash_has_cut_off_is_left_out(
    uri: str, client: MlflowClient, experiment: str, tmp_path: Path
) -> None:
    journal = tmp_path / "journal.jsonl"
    first = Tracker(uri, experiment, journal)
    first.start("run", "run")
    first.metrics("run", {"loss": 1.0}, step=1)
    first.close()
    with journal.open("a") as file:
        file.write('{"op": "metrics", "key": "r')
    second = Tracker(uri, experiment, journal)
    second.metrics("run", {"loss": 0.5}, step=2)
    second.close()
    third = Tracker(uri, experiment, journal)
    third.close()
    assert history(client, third.run_id("run"), "loss") == [(1, 1.0), (2, 0.5)]


def test_a_damaged_line_is_named(uri: str, experiment: str, tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    journal.write_text('{"sent": 1}\nwords\n{"sent": 2}\n')
    with pytest.raises(DataError, match=rf"{journal} line 2 is damaged \(.*delete the line"):
        Tracker(uri, experiment, journal)


# refusals


def test_a_refused_operation_does_not_hold_up_the_others(
    tracker: Tracker, client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    tracker.start("run", "run")
    for step in (1, 2):
        tracker.metrics("run", {"no such name!": 1.0}, step=step)
    tracker.metrics("run", {"loss": 1.0}, step=1)
    tracker.close()
    assert client.get_run(tracker.run_id("run")).data.metrics == {"loss": 1.0}
    (message,) = messages(caplog)
    assert "rejects 'metrics' of run 'run' (Invalid value" in message
    assert str(tracker.journal) in message


def test_a_run_that_is_refused_costs_neither_the_others_nor_its_children(
    tracker: Tracker, client: MlflowClient, experiment: str, caplog: pytest.LogCaptureFixture
) -> None:
    client.delete_experiment(experiment)
    tracker.start("search", "search")
    assert tracker.run_id("search") is None
    client.restore_experiment(experiment)
    tracker.metrics("search", {"loss": 1.0}, step=1)
    tracker.start("trial", "trial", parent="search")
    tracker.metrics("trial", {"loss": 2.0}, step=1)
    tracker.close()
    found = runs(client, experiment)
    assert found.keys() == {"trial"}
    assert found["trial"].data.metrics == {"loss": 2.0}
    assert found["trial"].info.status == "FINISHED"
    (message,) = messages(caplog)
    assert "rejects 'start' of run 'search'" in message


def test_what_was_refused_is_sent_when_the_run_is_resumed(
    uri: str, client: MlflowClient, experiment: str, tmp_path: Path
) -> None:
    """The experiment is deleted while the run goes on, and restored afterwards."""
    first = Tracker(uri, experiment, tmp_path / "journal.jsonl")
    client.delete_experiment(experiment)
    first.start("run", "run")
    first.metrics("run", {"loss": 1.0}, step=1)
    first.close()
    assert first.run_id("run") is None
    client.restore_experiment(experiment)
    second = Tracker(uri, experiment, tmp_path / "journal.jsonl")
    second.close()
    assert history(client, second.run_id("run"), "loss") == [(1, 1.0)]
    assert runs(client, experiment)["run"].info.status == "FINISHED"


def test_an_unexpected_error_is_told_and_the_thread_goes_on(
    uri: str,
    client: MlflowClient,
    experiment: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    journal = tmp_path / "journal.jsonl"
    first = Tracker(uri, experiment, journal)
    first.start("run", "run")
    first.close()
    with journal.open("a") as file:
        file.write(json.dumps({"op": "dance", "key": "run", "sequence": 2}) + "\n")
    second = Tracker(uri, experiment, journal)
    second.tags("run", {"after": "it"})
    second.close()
    assert client.get_run(second.run_id("run")).data.tags["after"] == "it"
    (message,) = messages(caplog)
    assert "rejects 'dance' of run 'run' (AttributeError: " in message


# the experiment


def test_a_deleted_experiment_is_refused(uri: str, store: Path, client: MlflowClient) -> None:
    client.delete_experiment(connect(uri, "gone", store))
    with pytest.raises(TrackingError, match="--experiment gone: was deleted in sqlite:///"):
        connect(uri, "gone", store)


def test_connecting_again_gives_the_same_experiment(uri: str, store: Path) -> None:
    assert connect(uri, "same", store) == connect(uri, "same", store)


def test_an_experiment_says_what_its_runs_are(uri: str, store: Path, client: MlflowClient) -> None:
    made = client.get_experiment(connect(uri, "described", store))
    assert made.tags["mlflow.note.content"].startswith("Runs of raygkd. ")
    assert made.tags["mlflow.experimentKind"] == "custom_model_development"


@pytest.mark.parametrize("name", ["contested 1", "contested 2", "contested 3", "contested 4"])
def test_an_experiment_that_several_make_at_once(uri: str, store: Path, name: str) -> None:
    at_once = threading.Barrier(8)

    def make(_: int) -> str:
        at_once.wait()
        return connect(uri, name, store)

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(make, range(8)))) == 1


@pytest.mark.parametrize("is_kept", [False, True])
def test_a_store_is_one_of_mlflows_own_whether_it_is_copied_or_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_kept: bool
) -> None:
    """A home that cannot be written keeps none."""
    (tmp_path / "home").mkdir()
    (tmp_path / "file").touch()
    cache = tmp_path / ("home" if is_kept else "file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    kept = tmp_path / "home" / "raygkd"
    for name in ("first", "second"):
        output = tmp_path / name
        output.mkdir()
        identity = connect(default_uri(output), "mine", output)
        [mine, own] = MlflowClient(default_uri(output)).search_experiments()
        assert (mine.experiment_id, mine.name) == (identity, "mine")
        assert mine.artifact_location.startswith(output.as_uri())
        assert own.artifact_location == f"{(output / 'mlartifacts').as_uri()}/0"
        assert len(list(kept.glob("*"))) == int(is_kept)
