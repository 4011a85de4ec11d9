"""Jobs on a cluster of several nodes with a token: an elastic one, and one that loses a node."""

from __future__ import annotations

import contextlib
import json
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from commands import REPOSITORY, Command
from nodes import Nodes, environment_of, network
from records import json_lines
from scenes import Scene
from servers import Server, wait_for

# more epochs than the first trial has done when the last one begins
TRIALS, EPOCHS = 3, 500
# far more epochs than there is time for: it is stopped
TRAIN = (
    *("train", "--dataset", "digits", "--limit-train", "512", "--student", "resnet8"),
    *("--method", "none", "--epochs", "9000"),
)
ELASTIC = (*TRAIN, "--workers", "1-2", "--name", "elastic")
FIXED = (*TRAIN, "--workers", "2", "--name", "fixed")
SEARCH = (
    *("--dataset", "digits", "--limit-train", "256", "--student", "resnet8", "--method", "none"),
    *("--trials", TRIALS, "--epochs", EPOCHS, "--scheduler", "none", "--seed", "3"),
    *("--gpus-per-worker", "0.5", "--name", "search"),
)
# Ray's own on every node, and its coordinator of all jobs
OF_RAY = ("DashboardAgent", "RuntimeEnvAgent", "_AutoscalingCoordinatorActor")
TRAINABLE = "ray::ResourceTrainable"
LEAVING_SECONDS = 60.0


@dataclass
class Spread:
    """What became of the jobs.

    Attributes:
        server: the MLflow server that they recorded to.
        output: the output folder.
        ranks: what each of two workers ended with.
        nodes: their addresses.
        elastic, fixed: number of workers by epoch, of the elastic job and of another.
        resized: seconds from the loss of a node, and from a new one, to the next epoch.
        code: exit code of what followed the elastic job to its end.
        log: what it was told.
        left: what was left of the elastic job, and after how many seconds nothing was.
        killed: trial -> epochs told of the search, when its driver was killed.
        lost: the same, when a node was lost.
        at_work: processes that trained on each node then.
        search: its result.
        search_log: what the search wrote in its second life.
        refused: exit code and error of a job, one of whose nodes does not see the output.
        mistakes: name -> exit code and error of a command that was refused.
        sent: files that went to the head with what ``raygkd submit`` sent, beside working folders.
        found: files that hold a secret.
    """

    server: Server
    output: Path
    ranks: list[dict[str, str]] = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)
    elastic: list[float] = field(default_factory=list)
    fixed: list[float] = field(default_factory=list)
    resized: list[float] = field(default_factory=list)
    code: int | None = None
    log: str = ""
    left: list[str] = field(default_factory=list)
    killed: dict[int, int] = field(default_factory=dict)
    lost: dict[int, int] = field(default_factory=dict)
    at_work: list[int] = field(default_factory=list)
    search: dict[str, Any] = field(default_factory=dict)
    search_log: str = ""
    refused: tuple[int, str] | None = None
    mistakes: dict[str, tuple[int, str]] = field(default_factory=dict)
    sent: list[Path] = field(default_factory=list)
    found: list[Path] = field(default_factory=list)


def spread(scene: Scene) -> Spread:
    """Run the jobs one after the other, on nodes that come and go."""
    planted = f"planted-{secrets.token_hex(8)}"
    environment = {"AWS_SECRET_ACCESS_KEY": planted, "MLFLOW_TRACKING_PASSWORD": planted}
    with network(3) as found, contextlib.ExitStack() as stack:
        server = Server(scene.folder("server"), found.outside)
        scene.stack.callback(server.kill)
        server.start()
        nodes = Nodes(found, scene.folder, environment, stack)
        outcome = Spread(server, scene.folder("spreading"))
        cluster = _Cluster(scene, nodes, environment, outcome)
        cluster.compare_ranks()
        outcome.nodes = [node.host.address for node in nodes.all]
        server.wait()
        cluster.shrink_and_grow()
        cluster.replace_a_node()
        nodes.add()
        cluster.kill_and_lose()
        cluster.ask_wrongly()
        if found.hosts[0].command:
            cluster.hide_the_output()
        outcome.sent = [
            path
            for path in nodes.all[0].folder.glob(
                "session_2*/runtime_resources/py_modules_files/_ray_pkg_*/**/*"
            )
            if path.is_file()
        ]
        places = [outcome.output, server.folder, *(node.folder for node in nodes.all)]
        outcome.found = [path for place in places for path in _holding(place, planted, nodes.token)]
        return outcome


@dataclass
class _Cluster:
    scene: Scene
    nodes: Nodes
    environment: dict[str, str]
    outcome: Spread

    def raygkd(self, *arguments: str | Path) -> Command:
        """Start a command on this machine, outside of the cluster."""
        return self.scene.start(*arguments, environment=self.nodes.client | self.environment)

    def ray(self, *arguments: str | Path | int) -> str:
        """Return what Ray's own command line prints."""
        done = subprocess.run(
            [Path(sys.executable).with_name("ray"), *map(str, arguments)],
            cwd=REPOSITORY,
            env=environment_of(self.nodes.client | self.environment),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def places(self) -> tuple[str | Path, ...]:
        """Where jobs write."""
        outcome = self.outcome
        return ("--output", outcome.output, "--tracking-uri", outcome.server.uri)

    def compare_ranks(self) -> None:
        """Train on two workers, of which there is room for one at first; look at what each has."""
        submit = ("job", "submit", "--submission-id", "ranks", "--no-wait")
        script = ("python", "print_ranks.py", self.outcome.output)
        self.ray(*submit, "--working-dir", Path(__file__).parent, "--", *script)
        wait_for(lambda: "no room yet: requesting nodes" in self.ray("job", "logs", "ranks"))
        self.nodes.add()
        out = self.ray("job", "logs", "--follow", "ranks")
        lines = [line for line in out.splitlines() if line.startswith('{"node"')]
        assert lines, out
        self.outcome.ranks = [json.loads(line) for line in lines]

    def shrink_and_grow(self) -> None:
        """Take a node from an elastic run and give it another; lose its client; stop it."""
        outcome, second = self.outcome, self.nodes.all[1]
        client = self.raygkd("submit", "--", *ELASTIC, *self.places)
        client.until(lambda: self.workers("elastic")[-1:] == [2.0])
        [job] = [line.split()[1] for line in client.err.splitlines() if line.startswith("job ")]
        client.send(signal.SIGKILL)
        logs = self.raygkd("jobs", "logs", job)
        self.nodes.lose(second)
        outcome.resized.append(self.seconds_until(logs, 1.0))
        self.nodes.add()
        outcome.resized.append(self.seconds_until(logs, 2.0))
        assert self.raygkd("jobs", "stop", job).wait() == 0
        outcome.code = logs.wait()
        outcome.log = logs.out + logs.err
        outcome.elastic = self.workers("elastic")
        deadline = time.monotonic() + LEAVING_SECONDS
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.5)
        outcome.left = left

    def replace_a_node(self) -> None:
        """Take a node from a run that needs all of them, and give it another; stop it."""
        outcome = self.outcome
        client = self.raygkd("submit", "--", *FIXED, *self.places)
        client.until(lambda: len(self.workers("fixed")) > 1)
        self.nodes.lose(self.nodes.all[-1])
        told = len(self.workers("fixed"))
        self.nodes.add()
        client.until(lambda: len(self.workers("fixed")) > told + 1)
        [job] = [line.split()[1] for line in client.err.splitlines() if line.startswith("job ")]
        assert self.raygkd("jobs", "stop", job).wait() == 0
        client.wait()
        outcome.fixed = self.workers("fixed")

    def workers(self, run: str) -> list[float]:
        """Return how many workers each epoch of a run had."""
        lines = json_lines(self.outcome.output / "runs" / f"train-{run}" / "metrics.jsonl")
        return [line["workers"] for line in lines]

    def seconds_until(self, command: Command, workers: float) -> float:
        """Return the seconds until an epoch with so many workers is told."""
        started = time.monotonic()
        command.until(lambda: self.workers("elastic")[-1] == workers)
        return time.monotonic() - started

    def left(self) -> list[str]:
        """Return the processes and placement groups of jobs."""
        processes = [
            title
            for node in self.nodes.all
            for title in node.titles("ray::")
            if not title.removeprefix("ray::").startswith(OF_RAY)
        ]
        listed = self.ray(
            "list", "placement-groups", "--format", "json", "--address", self.nodes.dashboard
        )
        groups = [group["state"] for group in json.loads(listed)]
        return processes + [state for state in groups if state != "REMOVED"]

    def kill_and_lose(self) -> None:
        """Kill the driver of a search; submit it again, and take a node from it."""
        outcome, head = self.outcome, self.nodes.all[0]
        submit = (
            *("job", "submit", "--no-wait", "--working-dir", ".", "--", "python", "jobs/tune.py"),
            *(*SEARCH, *self.places, "--teacher", self.scene.teacher),
        )
        self.ray(*submit)
        wait_for(lambda: len(self.told()) == TRIALS)
        [driver] = head.processes("python", "jobs/tune.py")
        driver.kill()
        outcome.killed = self.told()
        self.ray(*submit)
        wait_for(lambda: all(self.told()[trial] > outcome.killed[trial] for trial in range(TRIALS)))
        wait_for(self.all_at_work)
        self.nodes.lose(self.nodes.all[-1])
        outcome.lost = self.told()
        result = outcome.output / "runs" / "tune-search" / "result.json"
        # hundreds of epochs of three trials, on two nodes of one processor each
        wait_for(result.exists, patience=300.0)
        outcome.search = json.loads(result.read_text())
        outcome.search_log = self.raygkd_logs()

    def all_at_work(self) -> bool:
        """Return whether a trial is seen on every node; one between two calls has no such title."""
        outcome = self.outcome
        outcome.at_work = [len(node.processes(TRAINABLE)) for node in self.nodes.all]
        return all(outcome.at_work)

    def raygkd_logs(self) -> str:
        """Return what the last job wrote."""
        command = self.raygkd("jobs", "list", "--json")
        command.wait()
        logs = self.raygkd("jobs", "logs", json.loads(command.out)[0]["job"])
        assert logs.wait() == 0
        return logs.out

    def told(self) -> dict[int, int]:
        """Return trial -> epochs in the journal of the search."""
        entries = json_lines(self.outcome.output / "runs" / "tune-search" / "trials.jsonl")
        return {
            entry["trial"]: entry["metrics"]["epoch"] for entry in entries if "metrics" in entry
        }

    def ask_wrongly(self) -> None:
        """Ask for what is refused before anything is sent."""
        (folder := self.scene.folder("wrong")).joinpath("large.pth").write_text("#" * (11 << 20))
        submit = ("submit", "--no-wait", "--", "teacher", "--output", self.outcome.output)
        url = {"RAY_API_SERVER_ADDRESS": self.nodes.dashboard}
        wrong = url | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
        asked = {
            "no token": self.scene.start(*submit, environment=url),
            "wrong token": self.scene.start(*submit, environment=wrong),
            "no job": self.raygkd("jobs", "logs", "gone"),
            "large": self.raygkd(*submit, "--teacher-weights", folder / "large.pth"),
        }
        for name, command in asked.items():
            self.outcome.mistakes[name] = command.wait(), command.err

    def hide_the_output(self) -> None:
        """Submit to a cluster one of whose nodes has another folder in the output's place."""
        output = self.outcome.output
        hidden = (
            "unshare",
            "--mount",
            "sh",
            "-c",
            f'mount -t tmpfs none {output} && exec "$@"',
            "sh",
        )
        self.nodes.add(hidden)
        command = self.raygkd("submit", "--", *ELASTIC, *self.places, "--name", "hidden")
        self.outcome.refused = command.wait(), command.out


def _holding(place: Path, *texts: str) -> Iterator[Path]:
    """Yield the files below a folder that hold one of some texts."""
    for path in place.rglob("*"):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            if any(text.encode() in content for text in texts):
                yield path
