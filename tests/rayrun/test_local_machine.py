"""A cluster of this machine: to itself, within its limits, told when it is lost, and removed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import ray
from commands import FOREIGN

from raygkd.config import Config, with_settings
from raygkd.errors import ClusterLost, ConfigError, ResourceError
from raygkd.rayrun import cluster as clusters
from raygkd.rayrun.cluster import cluster, cluster_if, is_joined, places
from raygkd.rayrun.local_machine import NEEDED, open_work, session_parent

import psutil  # type: ignore[import-untyped]  # isort: skip  (ray brings it along)


@pytest.mark.ray
def test_a_cluster_is_its_own_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with cluster(None):
        ours = ray._private.worker._global_node.get_session_dir_path()
        assert ours.startswith("/tmp/raygkd-tmp-ray-")
        theirs = ray.get(ray.remote(tempfile.gettempdir).remote())
        assert ours.startswith(theirs)
        # another one does not join it, although its address is the newest
        code = (
            "from raygkd.rayrun.cluster import cluster\n"
            "import ray\n"
            "with cluster(None):\n"
            "    print(ray._private.worker._global_node.get_session_dir_path())"
        )
        environment = {name: one for name, one in os.environ.items() if name not in FOREIGN}
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        assert done.stdout.startswith("/tmp/raygkd-tmp-ray-"), done.stderr
        assert done.stdout.strip() != ours
    # other processes have clusters of their own beside these
    for session in (ours, done.stdout.strip()):
        assert not Path(*Path(session).parts[:3]).exists()
    assert list(long.iterdir()) == []


@pytest.mark.ray
@pytest.mark.parametrize(
    ("name", "number", "cause"),
    [
        *((name, signal.SIGKILL, "killed for lack of memory") for name in NEEDED),
        ("raylet", signal.SIGTERM, "by a signal to all processes of this command"),
    ],
)
def test_a_cluster_that_is_killed_ends_the_run_in_one_line(
    name: str, number: int, cause: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        with cluster(None), open_work("raygkd tune --resume out", int):
            waiting = ray.remote(lambda: time.sleep(100)).remote()
            [needed] = [one for one in psutil.Process().children() if one.name() == name]
            needed.send_signal(number)
            ray.get(waiting)

    started = time.monotonic()
    told = rf"^Ray's process {name} \([0-9]+\) ended unexpectedly, perhaps {cause}; "
    told += "resume with: raygkd tune --resume out$"
    with pytest.raises(ClusterLost, match=told) as raised:
        work()
    assert f"\nerror: {raised.value}\n" in capfd.readouterr().err
    assert time.monotonic() - started < 90
    assert not ray.is_initialized()


def test_no_address_is_none_of_a_running_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not is_joined(None)
    assert not is_joined("local")
    assert is_joined("auto")
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert not is_joined(None)


LIMITED = """
import resource, sys
from raygkd.rayrun.local_machine import check_limits
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
try:
    check_limits()
except Exception as error:
    print(type(error).__name__, error)
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.parametrize(("soft", "hard", "raised"), [(64, 64, 64), (64, 4096, 4096)])
def test_the_limit_of_open_files_is_raised_or_told(soft: int, hard: int, raised: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(soft), str(hard)],
        capture_output=True,
        text=True,
        check=True,
    )
    *told, limit = done.stdout.splitlines()
    assert int(limit) == raised
    if raised >= 1024:
        assert told == []
    else:
        assert told == [
            "ResourceError a process may open only 64 files at a time, and Ray needs 1024; raise "
            "the limit with 'ulimit -n 1024', or in the settings of the container or batch system"
        ]


def test_sockets_get_a_short_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    assert session_parent() == Path("/tmp")
    monkeypatch.setenv("RAY_TMPDIR", "/var/tmp")
    assert session_parent() == Path("/var/tmp")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 120)))
    assert session_parent() == Path("/tmp")
    monkeypatch.setenv("RAY_TMPDIR", "/nowhere")
    with pytest.raises(ResourceError, match="and /nowhere cannot be written; set RAY_TMPDIR to"):
        session_parent()


def test_demands_that_cannot_be_met_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(clusters, "local_node", lambda: {"CPU": 2.0, "GPU": 0.0})
    with (
        pytest.raises(ResourceError, match="with 0 CPU and 1 GPU each; the cluster has 2 CPU and"),
        cluster_if(True, None, gpus=1.0),
    ):
        pass
    with cluster_if(False, None) as nodes:
        assert nodes == [{"CPU": 2.0, "GPU": 0.0}]
    assert places(nodes, [{"CPU": 0.0, "GPU": 0.0}], data_cpus=0.0) == 1


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"cpus_per_worker": 1e-9}, "--cpus-per-worker 1e-09: must be at least 0.01"),
        ({"gpus_per_worker": 1e-9}, "--gpus-per-worker 1e-09: must be 0, from 0.01 to 1, or a wh"),
        ({"gpus_per_worker": 1.5}, "--gpus-per-worker 1.5: must be 0, from 0.01 to 1, or a whole"),
    ],
)
def test_shares_that_are_too_small(settings: dict[str, float], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        with_settings(Config(), settings)
    with_settings(Config(), {"cpus_per_worker": 0.01, "gpus_per_worker": 2.0})


HANGS_UP = """
import signal, sys, time
from pathlib import Path
from raygkd.cli import main
from raygkd.workflows.interrupts import Interrupts
from raygkd.rayrun.stop_signal import StopFolder
folder = Path(sys.argv[1])

def work(**options):
    interrupts = Interrupts(StopFolder(folder / "stop"), print)
    with interrupts.handled():
        (folder / "begun").touch()
        try:
            time.sleep(60)
        finally:
            print("closing", flush=True)
            (folder / "closed").touch()

main.commands.main = work
main.main()
"""


@pytest.mark.parametrize("has_nohup", [False, True])
def test_a_closed_terminal_stops_a_run_as_a_signal_does(tmp_path: Path, has_nohup: bool) -> None:
    leader, terminal = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", HANGS_UP, str(tmp_path)],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGHUP, signal.SIG_IGN if has_nohup else signal.SIG_DFL
        ),
    )
    os.close(terminal)
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.close(leader)
    process.send_signal(signal.SIGHUP)
    if has_nohup:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
        process.kill()
        process.wait()
    else:
        assert process.wait(30) == 130
    assert (tmp_path / "closed").exists() != has_nohup
