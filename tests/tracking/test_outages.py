"""Servers that are down, killed and slow; processes that crash; passwords in URIs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from disks import Disk
from mlflow import MlflowClient
from servers import PATIENCE, Server, wait_for

from raygkd.errors import StorageError, TrackingError
from raygkd.tracking.journal_entries import read_journal
from raygkd.tracking.store import connect
from raygkd.tracking.tracker import Tracker

# a process that makes a store, logs to a server that is down, and ends by a crash or in order
PROCESS = """
import os, sys
from pathlib import Path
from raygkd.tracking.store import connect, default_uri
from raygkd.tracking.tracker import Tracker

output, journal, dead, how = sys.argv[1:]
print(connect(default_uri(Path(output)), "raced", Path(output)), flush=True)
tracker = Tracker(dead, "1", Path(journal))
tracker.start("run", "run", params={"how": how})
for epoch in (1, 2, 3):
    tracker.metrics("run", {"loss": 1 / epoch}, step=epoch)
if how == "crash":
    os._exit(1)
tracker.close(timeout=1.0)
"""


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("raygkd.tracking")
    ]


# two processes at once


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple]]:
    """How -> exit code, output, errors and journal of two processes that start at once."""
    folder = tmp_path_factory.mktemp("raced")
    (folder / "output").mkdir()
    dead = "http://someone:hunter2@127.0.0.1:9"
    started = {}
    for how in ("crash", "close"):
        command = [sys.executable, "-c", PROCESS, str(folder / "output"), str(folder / how), dead]
        started[how] = subprocess.Popen(
            [*command, how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    try:
        ended = {}
        for how, process in started.items():
            out, err = process.communicate(timeout=PATIENCE)
            ended[how] = (process.returncode, out, err, folder / how)
        yield ended
    finally:
        for process in started.values():
            process.kill()


def test_two_processes_make_one_store_and_experiment(raced: dict[str, tuple]) -> None:
    (_, first, *_), (_, second, _, journal) = raced["crash"], raced["close"]
    assert first == second == "1\n"
    assert os.listdir(journal.parent / "output") == ["mlflow.db"]


@pytest.mark.parametrize("how", ["crash", "close"])
def test_what_a_process_could_not_send_is_sent_once_by_the_next(
    raced: dict[str, tuple], how: str, uri: str, client: MlflowClient, experiment: str
) -> None:
    journal = raced[how][3]
    tracker = Tracker(uri, experiment, journal)
    tracker.close()
    run = client.get_run(tracker.run_id("run"))
    assert run.data.params == {"how": how}
    assert run.info.status == "FINISHED"
    points = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in points] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert len(client.search_runs([experiment])) == 1


def test_a_process_ends_although_its_server_is_dead(raced: dict[str, tuple]) -> None:
    code, _, err, journal = raced["close"]
    assert code == 0
    outage, end = err.splitlines()
    assert outage.startswith("MLflow at http://127.0.0.1:9 does not answer (")
    assert f"has not received everything; the rest is kept in {journal}" in end


# passwords


def test_passwords_are_nowhere(raced: dict[str, tuple]) -> None:
    _, out, err, journal = raced["close"]
    for text in (out, err, journal.read_text()):
        assert "hunter2" not in text
        assert "someone" not in text


def test_passwords_in_what_is_logged(experiment: str, tmp_path: Path) -> None:
    uri = "http://someone:hunter2@127.0.0.1:9"
    tracker = Tracker(uri, experiment, tmp_path / "journal.jsonl")
    assert tracker.uri == "http://127.0.0.1:9"
    tracker.start("run", "run", tags={"at": uri}, texts={"config.yaml": f"tracking_uri: {uri}"})
    tracker.tags("run", {"at": uri})
    tracker.close(timeout=0.1)
    text = (tmp_path / "journal.jsonl").read_text()
    assert text.count("http://127.0.0.1:9") == 3
    assert "hunter2" not in text


@pytest.mark.parametrize("password", ["hunter2", "hun@ter2", "hun%40ter2"])
def test_passwords_in_errors(tmp_path: Path, closed_port: int, password: str) -> None:
    address = f"127.0.0.1:{closed_port}"
    with pytest.raises(TrackingError) as raised:
        connect(f"http://someone:{password}@{address}", "new", tmp_path)
    assert f"MLflow at http://{address} cannot be used: " in str(raised.value)
    assert "ter2" not in str(raised.value)
    assert "someone" not in str(raised.value)


def test_a_folder_with_an_at_sign_is_no_password(tracker: Tracker, uri: str) -> None:
    assert "me@work" in uri
    assert tracker.uri == uri


# a server that is down


def test_a_server_that_is_down_is_told_at_the_start(tmp_path: Path, closed_port: int) -> None:
    started = time.monotonic()
    with pytest.raises(TrackingError, match="no answer; start it, or omit --tracking-uri"):
        connect(f"http://127.0.0.1:{closed_port}", "new", tmp_path)
    assert time.monotonic() - started < 10


def test_closing_does_not_wait_longer_than_asked(
    experiment: str, tmp_path: Path, closed_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker(f"http://127.0.0.1:{closed_port}", experiment, tmp_path / "journal.jsonl")
    for epoch in range(50):
        tracker.start(f"run {epoch}", "run")
    wait_for(lambda: messages(caplog))
    started = time.monotonic()
    assert tracker.run_id("run 1") is None
    tracker.close(timeout=0.5)
    assert time.monotonic() - started < 5
    outage, end = messages(caplog)
    assert f"everything is kept in {tmp_path}/journal.jsonl" in outage
    assert f"has not received everything; the rest is kept in {tmp_path}/journal.jsonl" in end
    operations = [entry for entry in read_journal(tmp_path / "journal.jsonl") if "op" in entry]
    assert len(operations) == 100
    wait_for(lambda: "mlflow-sender" not in {thread.name for thread in threading.enumerate()})


def test_closing_does_not_wait_for_a_server_that_hangs(experiment: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        tracker = Tracker(uri, experiment, tmp_path / "journal.jsonl")
        tracker.start("run", "run")
        started = time.monotonic()
        tracker.close(timeout=0.2)
        assert time.monotonic() - started < 5


# a server that is killed


def test_a_server_that_is_killed_and_comes_back_has_everything_once(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    experiment = connect(server.uri, "killed", tmp_path)
    tracker = Tracker(server.uri, experiment, tmp_path / "journal.jsonl")
    tracker.start("search", "search", params={"a": 1}, texts={"config.yaml": "a: 1"})
    for epoch in range(20):
        tracker.start(f"t{epoch}", f"trial {epoch}", parent="search")
        tracker.metrics("search", {"loss": 1 / (1 + epoch), "score": epoch}, step=epoch)
        tracker.end(f"t{epoch}")
        if epoch == 9:
            # in the middle of a request
            assert tracker.run_id("t5") is not None
            server.kill()
    wait_for(lambda: messages(caplog))
    server.start()
    server.wait()
    tracker.close(timeout=PATIENCE)

    client = MlflowClient(tracking_uri=server.uri)
    found = client.search_runs([experiment])
    assert len({run.info.run_name for run in found}) == len(found) == 21
    assert {run.info.status for run in found} == {"FINISHED"}
    for name in ("loss", "score"):
        points = client.get_metric_history(tracker.run_id("search"), name)
        assert sorted(point.step for point in points) == list(range(20))
    (message,) = messages(caplog)
    assert f"MLflow at {server.uri} does not answer" in message


# a journal that cannot be written


def log_steps(tracker: Tracker, number: int) -> None:
    for step in range(number):
        tracker.metrics("run", {"loss": step}, step=step)


def test_mlflow_hears_the_end_that_cannot_be_written_down(
    uri: str, client: MlflowClient, experiment: str, tmp_path: Path
) -> None:
    disk = Disk(tmp_path, megabytes=1)
    try:
        journal = tmp_path / "journal.jsonl"
        tracker = Tracker(uri, experiment, journal)
        tracker.start("run", "run")
        run_id = tracker.run_id("run")
        assert run_id is not None
        disk.fill()
        with pytest.raises(StorageError, match=f"cannot write {journal}: No space left"):
            log_steps(tracker, 1000)
        tracker.close("FAILED")
        assert client.get_run(run_id).info.status == "FAILED"
        disk.make_room()
        written = len([entry for entry in read_journal(journal) if entry.get("op") == "metrics"])

        tracker = Tracker(uri, experiment, journal)
        tracker.start("run", "run")
        tracker.metrics("run", {"loss": 0}, step=0)
        tracker.close()
        assert tracker.run_id("run") == run_id
        assert client.get_run(run_id).info.status == "FINISHED"
        points = client.get_metric_history(run_id, "loss")
        assert [point.step for point in points] == list(range(written))
    finally:
        disk.end()
