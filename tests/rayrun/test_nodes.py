"""A search over two nodes, one of which is lost."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray  # noqa: F401  (brings psutil along)
from commands import FOREIGN, Command
from mlflow import MlflowClient
from records import (
    configuration_of,
    curves,
    images_of,
    json_lines,
    plain_training,
    rescored,
    running,
)
from servers import free_port

from raygkd import tracking
from raygkd.config import with_settings

import psutil  # type: ignore[import-untyped]  # isort: skip

TRIALS, EPOCHS = 2, 40
TUNE = (
    *("tune", "--dataset", "digits", "--limit-train", "256", "--student", "resnet8"),
    *("--method", "none", "--trials", TRIALS, "--epochs", EPOCHS, "--scheduler", "none"),
    *("--gpus-per-worker", "0.5", "--seed", "3", "--json"),
)


class Node:
    """``ray start`` with one CPU and one GPU, in a process group of its own.

    The GPU is one in Ray's books alone: where torch finds none, what is placed on it uses the CPU.

    Args:
        folder: gets Ray's files; a short path, since there are sockets in it.
        arguments: of ``ray start``.
    """

    def __init__(self, folder: Path, *arguments: str):
        command = [
            str(Path(sys.executable).with_name("ray")),
            "start",
            "--block",
            *("--num-cpus", "1", "--num-gpus", "1"),
        ]
        environment = {name: value for name, value in os.environ.items() if name not in FOREIGN}
        with (folder / "log").open("w") as log:
            self._process = subprocess.Popen(
                [*command, "--temp-dir", str(folder), *arguments],
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        self._log = folder / "log"

    def wait(self) -> None:
        """Wait until it is part of the cluster."""
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in self._log.read_text():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.1)

    def kill(self) -> None:
        """Kill all of it at once, as a machine does that loses its power."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._process.pid)
            for process in [root, *root.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
        self._process.wait(30)


@dataclass(frozen=True)
class Lost:
    """A search that has lost a node.

    Attributes:
        epochs: trial -> epochs that were told when the node was lost.
        result: of the search.
        warnings: what it wrote to standard error.
    """

    epochs: dict[int, int]
    result: dict[str, Any]
    warnings: str


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Node]]:
    """The address of two nodes, and the second of them."""
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text(secrets.token_hex(32))
    port = free_port()
    address = f"127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as environment, contextlib.ExitStack() as stack:
        # the nodes and the command have it from here
        environment.setenv("RAY_AUTH_MODE", "token")
        environment.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        head = ("--head", "--port", str(port), "--dashboard-port", str(free_port()))
        for arguments in (head, ("--address", address)):
            node = Node(tmp_path_factory.mktemp("n"), *arguments)
            stack.callback(node.kill)
            node.wait()
        yield address, node


def told(folder: Path) -> dict[int, int]:
    """Return trial -> epochs in the journal of a search."""
    entries = json_lines(folder / "trials.jsonl")
    return {entry["trial"]: entry["metrics"]["epoch"] for entry in entries if "metrics" in entry}


@pytest.fixture(scope="module")
def lost(
    raygkd: Callable[..., Command],
    output: Path,
    untrained_teacher: Path,
    two_nodes: tuple[str, Node],
) -> Lost:
    address, second = two_nodes
    before = set((output / "runs").glob("tune-*"))
    command = raygkd(
        *TUNE, "--teacher", untrained_teacher, "--output", output, "--address", address
    )

    def both_at_work() -> list[Path]:
        found = set((output / "runs").glob("tune-*")) - before
        return [folder for folder in found if len(told(folder)) == TRIALS]

    [folder] = command.until(both_at_work)
    second.kill()
    return Lost(told(folder), command.result(), command.err)


def test_the_trial_of_a_lost_node_goes_on_after_its_last_epoch(lost: Lost) -> None:
    trials = lost.result["trials"]
    assert [(trial["status"], trial["epochs"]) for trial in trials] == [("finished", EPOCHS)] * 2
    assert max(lost.epochs.values()) < EPOCHS
    [line] = [line for line in lost.warnings.splitlines() if "lost its process" in line]
    [number] = [n for n in lost.epochs if f"trial {n} lost" in line]
    assert "it goes on after epoch" in line
    assert int(line.rpartition(" ")[2]) >= lost.epochs[number]


def test_models_are_scored_where_there_is_a_gpu(lost: Lost) -> None:
    run = Path(lost.result["run"])
    assert lost.result["best"]["test_score"] == rescored(run / "model.pt", run, "test")["score"]


def test_trials_learn_what_they_do_without_the_loss(lost: Lost, output: Path) -> None:
    client = MlflowClient(tracking.default_uri(output))
    searched = configuration_of(Path(lost.result["run"]))
    images = images_of(searched)
    for trial in lost.result["trials"]:
        training = plain_training(with_settings(searched, trial["params"]), images, None)
        expected = {epoch: training.run_epoch()["val_score"] for epoch in range(1, EPOCHS + 1)}
        assert curves(client, trial["run_id"])["val_score"] == expected
    assert running(client) == []
