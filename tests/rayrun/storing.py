"""A search and a run in an object store: interrupted, killed, and gone on with from there alone."""

from __future__ import annotations

import io
import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from commands import Command
from scenes import TUNE, Scene
from servers import ObjectStore, Server

TRAIN = (
    *("train", "--dataset", "parquet", "--limit-train", "256", "--student", "resnet8"),
    *("--method", "kd", "--epochs", "2", "--cache-mb", "0", "--workers", "2"),
    *("--cpus-per-worker", "0.5", "--json"),
)


@dataclass(frozen=True)
class Stored:
    """What a search and a run of two workers in an object store came to.

    Attributes:
        store: the object store.
        server: MLflow's, whose artifacts are in the store.
        run: URL of the search's folder.
        interrupted: the command of the search that Ctrl-C ended.
        code, seconds: its exit code, and from Ctrl-C to its end.
        stopped: the checkpoint that the trial under way wrote then.
        told: trials and epochs that the journal had when the search was killed.
        searched: what the last command printed, which found nothing on its machine.
        trained: what the run of two workers printed.
        said: all that the commands wrote.
        machine: has the home and the working folder of the last two commands.
    """

    store: ObjectStore
    server: Server
    run: str
    interrupted: Command
    code: int
    seconds: float
    stopped: dict[str, Any]
    told: list[tuple[int, int]]
    searched: dict[str, Any]
    trained: dict[str, Any]
    said: str
    machine: Path


def lines(store: ObjectStore, run: str, name: str) -> list[dict[str, Any]]:
    """Return the entries of a journal of a run."""
    prefix = run.removeprefix(store.url + "/") + f"/{name}/"
    parts = store.objects(prefix)
    text = b"".join(parts[key] for key in sorted(parts))
    return [json.loads(line) for line in text.splitlines()]


def epochs(store: ObjectStore, run: str) -> list[tuple[int, int]]:
    """Return trial and epoch of what a search's journal holds."""
    entries = lines(store, run, "trials.jsonl")
    return [(e["trial"], int(e["metrics"]["epoch"])) for e in entries if "metrics" in e]


def checkpoint(store: ObjectStore, run: str, number: int) -> dict[str, Any]:
    """Return the checkpoint of a trial."""
    key = run.removeprefix(store.url + "/") + f"/trials/{number:04d}/checkpoint.pt"
    return torch.load(io.BytesIO(store.objects(key)[key]), weights_only=True)


def keep(scene: Scene) -> Stored:
    """Interrupt a search, kill it with all it has, go on elsewhere; then train with two workers."""
    store = ObjectStore(scene.folder("objects"))
    scene.stack.callback(store.kill)
    store.start()
    store.wait()
    server = Server(
        scene.folder("server"), artifacts=f"{store.url}/mlflow", environment=store.environment
    )
    scene.stack.callback(server.kill)
    server.start()
    store.client().upload_file(scene.teacher, store.bucket, "given/teacher.pt")
    output, teacher = f"{store.url}/out", f"{store.url}/given/teacher.pt"
    server.wait()
    first, second = (_machine(scene) for _ in range(2))

    def start(machine: Path, *arguments: str | Path) -> Command:
        environment = {**store.environment, "HOME": str(machine / "home")}
        return scene.start(*arguments, cwd=machine / "cwd", environment=environment)

    def run() -> str:
        keys = store.objects("out/runs/")
        names = {key.split("/")[2] for key in keys if "trials.jsonl" in key}
        return f"{output}/runs/{names.pop()}" if names else ""

    where = ("--output", output, "--tracking-uri", server.uri, "--teacher", teacher)
    interrupted = start(first, *TUNE, *where)
    folder = interrupted.until(run)
    interrupted.until(lambda: epochs(store, folder)[1:])
    seconds = interrupted.stop(signal.SIGINT)
    number, _ = epochs(store, folder)[-1]
    stopped = checkpoint(store, folder, number)

    killed = start(first, "tune", "--resume", folder)
    killed.until(lambda: epochs(store, folder)[12:])
    killed.kill_all()
    killed.wait()
    told = epochs(store, folder)

    last = start(second, "tune", "--resume", output, "--json")
    searched = last.result()
    [shards] = {key.rpartition("/")[0] for key in store.objects("out/data/") if "part-" in key}
    training = start(second, *TRAIN, *where, "--data-dir", f"{store.url}/{shards}")
    trained = training.result()
    said = "".join(one.out + one.err for one in (interrupted, killed, last, training))
    return Stored(
        store=store,
        server=server,
        run=folder,
        interrupted=interrupted,
        code=interrupted.wait(),
        seconds=seconds,
        stopped=stopped,
        told=told,
        searched=searched,
        trained=trained,
        said=said,
        machine=second,
    )


def _machine(scene: Scene) -> Path:
    """Return a folder with a home and a working folder in which nothing is."""
    folder = scene.folder("machine")
    for name in ("home", "cwd"):
        (folder / name).mkdir()
    return folder
