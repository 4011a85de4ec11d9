"""Models of one's own files, and weights of them, in jobs on a cluster."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from nodes import Nodes, environment_of, network

from raygkd.models import load_model_file

pytestmark = pytest.mark.slow

NETS = """
from torch import nn


class Net(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(2 * width, classes)

    def forward(self, images):
        return self.head(self.body(self.stem(images)).mean((2, 3)))


def large(classes):
    return Net(24, classes)


def small(classes):
    return Net(8, classes)


def smaller(classes):
    return Net(6, classes)
"""
DIGITS = ("--dataset", "digits", "--limit-train", "200", "--epochs", "1")


@pytest.fixture
def submit(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """A function that runs a command as a job on a cluster of one node."""
    with network(1) as found, contextlib.ExitStack() as stack:
        nodes = Nodes(found, tmp_path_factory.mktemp, {}, stack)

        def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, "-m", "raygkd", "submit", "--", *map(str, arguments)],
                env=environment_of(nodes.client),
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=600,
            )

        yield run


def test_files_of_models_and_weights_travel_with_a_job(
    submit: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    names: dict[str, Callable[[int], torch.nn.Module]] = {}
    exec(NETS, names)
    torch.manual_seed(0)
    torch.save(names["large"](10).state_dict(), tmp_path / "large.pth")
    output = tmp_path / "out"
    teacher = ("--teacher", "nets.py:large", "--teacher-weights", "large.pth")
    students = ("--students", "nets.py:small,nets.py:smaller", "--max-params", "9999")
    ran = submit(
        *("tune", *DIGITS, *teacher, "--teacher-mode", "as-is", *students, "--trials", "2"),
        *("--output", output, "--name", "sent", "--json"),
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    result = json.loads((output / "runs" / "tune-sent" / "result.json").read_text())
    assert len(result["students"]) == 2
    # the run keeps its own copy of the file, since that of the job is gone
    model = load_model_file(output / "runs" / "tune-sent" / "model.pt")
    assert model.name.split("/")[-1].split(":")[-1] in ("small", "smaller")
