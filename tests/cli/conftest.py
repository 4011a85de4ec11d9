"""The command line run inside this process, and small real inputs for it."""

from __future__ import annotations

import itertools
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from outcomes import CLASSES, PROGRESS, ROWS, Ran, files, mlflow_runs, png

from raygkd.assembly.models import untrained_file
from raygkd.cli import main as command_line
from raygkd.data.spec import ImageSpec
from raygkd.models import save_model_file
from raygkd.tracking.store import connect, default_uri

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose output folder holds an MLflow store already, which takes seconds to make."""
    folder = tmp_path_factory.mktemp("workplace")
    output = folder / "raygkd-output"
    (output / "data").mkdir(parents=True)
    connect(default_uri(output), "raygkd", output)
    return folder


@pytest.fixture
def raygkd(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """Return a function that runs the command line with the arguments given."""

    def run(*arguments: str | Path) -> Ran:
        monkeypatch.setattr(sys, "argv", ["raygkd", *map(str, arguments)])
        monkeypatch.chdir(workplace)
        before = signal.getsignal(signal.SIGTERM)
        capfd.readouterr()
        try:
            code = command_line.run()
        finally:
            signal.signal(signal.SIGTERM, before)
        return Ran(code, *capfd.readouterr())

    return run


@pytest.fixture
def refused(raygkd: Callable[..., Ran], workplace: Path, tmp_path: Path) -> Callable[..., str]:
    """Return a function that runs a command which must refuse its input, and gives its message.

    Nothing may be on stdout, only error lines (and progress) on stderr, and no file or folder new.
    """

    def run(*arguments: str | Path, lines: int = 1) -> str:
        before = files(workplace, tmp_path)
        ran = raygkd(*arguments)
        errors = [line for line in ran.err.splitlines() if not line.startswith(PROGRESS)]
        assert (ran.code, ran.out) == (2, ""), ran.err
        assert len(errors) == lines, ran.err
        assert all(line.startswith("error: ") for line in errors), ran.err
        assert files(workplace, tmp_path) == before
        assert mlflow_runs(workplace / "raygkd-output" / "mlflow.db") == 0
        return ran.err

    return run


@pytest.fixture
def parquet(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a foreign Parquet file of 60 images.

    Its keyword arguments replace columns; None leaves one out.
    """

    def write(
        *, cut_off: Iterable[int] = (), metadata: Mapping[str, str] | None = None, **columns: Any
    ) -> Path:
        images = [png(row) for row in range(ROWS)]
        for row in cut_off:
            images[row] = images[row][:50]
        given = {"image": images, "label": [row % CLASSES for row in range(ROWS)], **columns}
        table = pa.table({name: column for name, column in given.items() if column is not None})
        path = tmp_path / "images.parquet"
        pq.write_table(table.replace_schema_metadata(metadata), path)
        return path

    return write


@pytest.fixture
def good(parquet: Callable[..., Path]) -> tuple[str, ...]:
    """The options of a run on 48 training images, in which nothing is wrong."""
    return ("--dataset", "parquet", "--data-dir", str(parquet()), "--batch-size", "8")


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes folders of different images: class=number of images."""

    def write(**classes: int) -> Path:
        root, seeds = tmp_path / "photos", itertools.count()
        for name, images in classes.items():
            (root / name).mkdir(parents=True)
            for number in range(images):
                (root / name / f"{number}.png").write_bytes(png(next(seeds)))
        return root

    return write


@pytest.fixture
def model_file(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes the model file of an untrained resnet20."""

    def write(*class_names: str) -> Path:
        path = tmp_path / "teacher.pt"
        spec = ImageSpec(
            class_names=class_names, image_size=(12, 12), mean=(0.5,) * 3, std=(0.2,) * 3
        )
        save_model_file(path, untrained_file("resnet20", spec))
        return path

    return write


@pytest.fixture
def yaml_file(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that writes a YAML file."""

    def write(text: str) -> Path:
        path = tmp_path / "given.yaml"
        path.write_text(text)
        return path

    return write
