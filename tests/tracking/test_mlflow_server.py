"""`raygkd ui`: the runs of an output folder, for this machine alone or for who has the password."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import requests
from mlflow import MlflowClient
from servers import PATIENCE, answers, free_port, wait_for

from raygkd.errors import ConfigError, ResourceError, TrackingError
from raygkd.tracking.server import serve
from raygkd.tracking.store import connect, default_uri
from raygkd.tracking.tracker import Tracker

USER, PASSWORD = "a team", "planted%secret: 1"


def fields(pid: str) -> list[str]:
    """Return what the kernel tells of a process: state, parent, group, session and so on."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ["Z", "0", "0", "0"]


def session(pid: int) -> set[int]:
    """Return the processes of a session that are not over."""
    numbers = [path.name for path in Path("/proc").iterdir() if path.name.isdigit()]
    return {
        int(number)
        for number in numbers
        if fields(number)[3] == str(pid) and fields(number)[0] != "Z"
    }


def listening(port: int) -> set[str]:
    """Return the addresses that something listens on at a port, as the kernel writes them."""
    tables = [Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6")]
    lines = [line.split() for table in tables for line in table.splitlines()]
    places = [line[1].split(":") for line in lines if line[3] == "0A"]
    return {address for address, hexadecimal in places if int(hexadecimal, 16) == port}


@pytest.fixture
def ui(
    store: Path, closed_port: int, tmp_path: Path
) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "raygkd", "ui", "--output", str(store)]
        processes.append(
            subprocess.Popen(
                [*command, "--port", str(closed_port)],
                stderr=subprocess.PIPE,
                text=True,
                cwd=tmp_path,
                start_new_session=True,
            )
        )
        return processes[-1]

    yield start
    for process in processes:
        with process:
            for pid in session(process.pid):
                os.kill(pid, signal.SIGKILL)


def test_ui_shows_the_runs_here_alone_until_ctrl_c(
    ui: Callable[[], subprocess.Popen[str]], closed_port: int, tmp_path: Path
) -> None:
    process = ui()
    url = f"http://127.0.0.1:{closed_port}"
    wait_for(lambda: answers(f"{url}/health") or process.poll() is not None)
    assert listening(closed_port) == {f"{socket.htonl(0x7F000001):08X}"}
    for host in ("127.0.0.1", "localhost"):
        request = urllib.request.Request(
            f"http://{host}:{closed_port}/api/2.0/mlflow/experiments/search",
            data=b'{"max_results": 100}',
            headers={"Content-Type": "application/json", "Origin": f"http://{host}:{closed_port}"},
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            names = {experiment["name"] for experiment in json.load(answer)["experiments"]}
        assert "first" in names
        assert answers(f"http://{host}:{closed_port}/")
    assert len(session(process.pid)) > 1

    # Ctrl-C reaches the whole group of the terminal
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(PATIENCE) == 0
    # what is killed takes a moment to be gone
    wait_for(lambda: not session(process.pid), patience=10.0)
    err = process.communicate()[1]
    first, *pages = err.splitlines()
    assert first == f"MLflow UI on {url} (Ctrl-C stops it)"
    page = rf"runs of first: {url}/#/experiments/\d+/runs\?workflowType=machine_learning"
    assert [line for line in pages if re.fullmatch(page, line)], err
    assert "Traceback" not in err
    assert "INFO" not in err
    assert list(tmp_path.iterdir()) == []


def test_ui_ends_on_sigterm_while_it_starts(
    ui: Callable[[], subprocess.Popen[str]],
) -> None:
    process = ui()
    wait_for(lambda: len(session(process.pid)) > 1 or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
    # what is killed takes a moment to be gone
    wait_for(lambda: not session(process.pid), patience=10.0)
    assert "Traceback" not in process.communicate()[1]


# beyond loopback


@dataclass(frozen=True)
class Team:
    """A server for other machines as well, over a folder that was not there."""

    process: subprocess.Popen[bytes]
    port: int
    output: Path
    temporary: Path
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method: str, path: str, **how: object) -> requests.Response:
        return requests.request(method, self.url + path, timeout=PATIENCE, **how)


@pytest.fixture(scope="module", autouse=True)
def starting_team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """It takes seconds to start, in which other tests run."""
    folder, port = tmp_path_factory.mktemp("team"), free_port()
    (folder / "tmp").mkdir()
    command = [sys.executable, "-m", "raygkd", "ui", "--host", "0.0.0.0", "--port", str(port)]
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_USERNAME": USER,
        "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        "TMPDIR": str(folder / "tmp"),
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--output", str(folder / "new" / "output")],
            stdout=log,
            stderr=log,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
    yield Team(process, port, folder / "new" / "output", folder / "tmp", folder / "log")
    for pid in session(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()


@pytest.fixture
def team(starting_team: Team) -> Team:
    wait_for(
        lambda: answers(f"{starting_team.url}/health") or starting_team.process.poll() is not None
    )
    assert starting_team.process.poll() is None, starting_team.log.read_text()
    return starting_team


@pytest.fixture
def member(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has the password."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)


SEARCH = "2.0/mlflow/experiments/search"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/version"),
        ("GET", "/docs"),
        ("GET", "/signup"),
        ("POST", f"/api/{SEARCH}"),
        ("POST", f"/ajax-api/{SEARCH}"),
        ("POST", "/api/2.0/mlflow/runs/create"),
        ("POST", "/graphql"),
        ("GET", "/get-artifact?run_id=1&path=a"),
        ("GET", "/model-versions/get-artifact?name=a&version=1&path=a"),
        ("POST", "/ajax-api/2.0/mlflow/upload-artifact"),
        ("GET", "/api/2.0/mlflow-artifacts/artifacts"),
        ("GET", "/api/2.0/mlflow-artifacts/artifacts/1/a"),
        ("PUT", "/api/2.0/mlflow-artifacts/artifacts/1/a"),
        ("GET", "/ajax-api/3.0/mlflow/traces/1"),
        ("GET", "/ajax-api/3.0/jobs/1"),
        ("GET", "/ajax-api/3.0/mlflow/assistant/config"),
        ("POST", "/gateway/mlflow/v1/chat/completions"),
        ("POST", "/v1/traces"),
        ("POST", "/api/2.0/mlflow/users/create"),
        ("PATCH", "/api/2.0/mlflow/users/update-password"),
    ],
)
def test_nobody_gets_an_answer_without_the_password(team: Team, method: str, path: str) -> None:
    assert team.ask(method, path).status_code == 401


@pytest.mark.parametrize("auth", [(USER, "planted%secret: 2"), ("admin", "password1234")])
def test_a_wrong_password_is_as_good_as_none(team: Team, auth: tuple[str, str]) -> None:
    for path in ("/", "/api/2.0/mlflow-artifacts/artifacts"):
        assert team.ask("GET", path, auth=auth).status_code == 401


def test_all_that_is_open_is_the_server_itself(team: Team) -> None:
    assert team.ask("GET", "/health").text == "OK"
    facts = team.ask("GET", "/api/3.0/mlflow/server-info").json()
    assert str(team.output) not in json.dumps(facts)
    assert listening(team.port) == {"00000000"}


def test_members_record_and_read_through_the_server(
    team: Team, member: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = Tracker(team.url, connect(team.url, "of all", tmp_path), tmp_path / "journal.jsonl")
    tracker.start("run", "run", texts={"config.yaml": "seed: 1"})
    tracker.metrics("run", {"loss": 0.5}, step=1)
    tracker.close(timeout=PATIENCE)
    client = MlflowClient(team.url, team.url)
    run = client.get_run(tracker.run_id("run"))
    assert run.data.metrics == {"loss": 0.5}
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["config.yaml"]
    path = client.download_artifacts(run.info.run_id, "config.yaml", str(tmp_path))
    assert Path(path).read_text() == "seed: 1"
    assert client.get_experiment("0").artifact_location == "mlflow-artifacts:/0"
    # it is the server's machine that has the file
    kept = [path.name for path in (team.output / "mlartifacts").rglob("*") if path.is_file()]
    assert "config.yaml" in kept
    assert {path.name for path in tmp_path.iterdir()} == {"journal.jsonl", "config.yaml"}
    assert team.ask("GET", "/", auth=(USER, PASSWORD)).status_code == 200


def test_runs_of_the_servers_own_machine_are_shown_with_their_files(
    team: Team, member: None
) -> None:
    uri = default_uri(team.output)
    experiment = connect(uri, "of one machine", team.output)
    client = MlflowClient(uri, uri)
    run = client.create_run(experiment).info.run_id
    client.log_text(run, "seed: 2", "config.yaml")
    path = f"/get-artifact?run_id={run}&path=config.yaml"
    assert team.ask("GET", path, auth=(USER, PASSWORD)).text == "seed: 2"
    # whoever has the folder may record there
    assert connect(team.url, "of one machine", team.output) == experiment


def test_an_experiment_with_artifacts_that_are_out_of_reach_is_refused(
    team: Team, member: None, tmp_path: Path
) -> None:
    there = "file:///srv/of%20another%20machine/mlartifacts"
    MlflowClient(team.url, team.url).create_experiment("of another", artifact_location=there)
    with pytest.raises(TrackingError) as raised:
        connect(team.url, "of another", tmp_path)
    assert str(raised.value) == (
        f"--experiment of another: {team.url} stores its artifacts in /srv/of another machine/"
        "mlartifacts, which is not on this machine; use another --experiment, whose artifacts the "
        "server stores"
    )
    connect(team.url, "of the server", tmp_path)
    with pytest.raises(TrackingError, match="of the server: was created through a server, which"):
        connect(default_uri(team.output), "of the server", team.output)


def own_names() -> set[str]:
    """Return this machine's names and addresses as a URL has them."""
    places = [place for places in psutil.net_if_addrs().values() for place in places]
    four = {place.address for place in places if place.family == socket.AF_INET}
    six = {place.address for place in places if place.family == socket.AF_INET6}
    return {
        *("localhost", socket.gethostname().lower(), *four),
        *(f"[{address.partition('%')[0]}]" for address in six),
    }


def test_browsers_are_served_under_the_machines_own_names_alone(team: Team) -> None:
    def answer(host: str, origin: str) -> int:
        return team.ask(
            "POST",
            f"/ajax-api/{SEARCH}",
            json={"max_results": 1},
            headers={"Host": host, "Origin": origin},
            auth=(USER, PASSWORD),
        ).status_code

    for name in own_names():
        place = f"{name}:{team.port}"
        assert answer(place, f"http://{place}") == 200, name
        assert answer(place, "http://elsewhere.example") == 403
    # a name that somebody else has bound to this machine
    place = f"elsewhere.example:{team.port}"
    assert answer(place, team.url) == 403
    assert answer(place, f"http://{place}") == 403


def test_every_address_of_the_machine_is_served(team: Team) -> None:
    places = [place for places in psutil.net_if_addrs().values() for place in places]
    for place in places:
        if place.family == socket.AF_INET:
            url = f"http://{place.address}:{team.port}/"
            answer = requests.get(url, auth=(USER, PASSWORD), timeout=PATIENCE)
            assert answer.status_code == 200


def test_the_password_is_on_no_command_line_and_in_no_file(team: Team) -> None:
    processes = [psutil.Process(pid) for pid in session(team.process.pid)]
    assert len(processes) > 2
    for process in processes:
        assert "planted" not in " ".join(process.cmdline())
    (private,) = team.temporary.iterdir()
    assert private.stat().st_mode & 0o777 == 0o700
    for path in [*team.temporary.rglob("*"), *team.output.rglob("*"), team.log]:
        assert path.is_dir() or b"planted" not in path.read_bytes(), path


# the last one of the module that asks the server
def test_the_server_tells_how_to_record_and_leaves_no_users_behind(team: Team) -> None:
    url = f"http://{socket.gethostname().lower()}:{team.port}"
    team.process.send_signal(signal.SIGTERM)
    assert team.process.wait(PATIENCE) == 0
    wait_for(lambda: not session(team.process.pid), patience=10.0)
    told = team.log.read_text()
    first, where, how, *_ = told.splitlines()
    assert first == f"MLflow UI on {url} (Ctrl-C stops it)"
    assert "'Model training'" in where
    assert f"pass --tracking-uri {url} and set MLFLOW_TRACKING_USERNAME and " in how
    assert "Traceback" not in told
    # so that the next start knows the next password alone
    assert list(team.temporary.iterdir()) == []
    assert {path.name for path in team.output.iterdir()} == {"mlflow.db", "mlartifacts"}


@pytest.mark.parametrize(
    ("user", "password", "said"),
    [
        ("", "", "--host 0.0.0.0: serves other machines as well, which requires a password"),
        (
            "me",
            "",
            "which requires a password; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASS",
        ),
        ("", "long enough to do", "which requires a password; set MLFLOW_TRACKING_USERNAME and"),
        ("me", "eleven char", "MLFLOW_TRACKING_PASSWORD: must have at least 12 characters"),
        ("me", "password1234", "MLFLOW_TRACKING_PASSWORD: must have at least 12 characters, and"),
    ],
)
def test_others_are_not_served_without_a_password(
    user: str, password: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    with pytest.raises(ConfigError) as raised:
        serve(tmp_path / "new", "0.0.0.0", free_port())
    assert said in str(raised.value)
    assert password == "" or password not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("host", ["203.0.113.77", "no such name", "::ffff:203.0.113.77"])
def test_a_host_that_is_not_this_machine_is_refused(
    host: str, member: None, tmp_path: Path
) -> None:
    with pytest.raises(ResourceError, match=f"--host {host}: is not an address of this machine"):
        serve(tmp_path / "new", host, free_port())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "::1", "localhost"])
def test_loopback_needs_a_store_and_no_password(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"contains no mlflow\.db"):
        serve(tmp_path, host, free_port())
