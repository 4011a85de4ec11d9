"""Mutated files of settings, runs and models give values, or one line; never another exception."""

from __future__ import annotations

import io
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raygkd.config import Config, from_yaml, to_yaml
from raygkd.config.search_space import read_space
from raygkd.errors import UserError
from raygkd.models import load_model_file
from raygkd.models.files import FORMAT
from raygkd.tracking.journal_entries import read_journal
from raygkd.workflows.run_files import read_facts, read_result

pytestmark = pytest.mark.unit

TOKENS = [
    b"", b"\0", b"\xff\xfe", b"-1", b"1e999", b".nan", b"null", b"[]", b"{}", b'"', b"&a ", b"*a",
    b"9" * 400, b"[" * 2000, b"!!python/name:os.system", b"true", b"\n", b": ", b"<<: *a", b",",
]  # fmt: skip
MOST_BYTES = 1 << 30


def model_file() -> bytes:
    file = io.BytesIO()
    contents = {
        "format": FORMAT, "name": "resnet8", "class_names": ("a", "b"), "image_size": (8, 8),
        "mean": (0.5,) * 3, "std": (0.2,) * 3, "state_dict": {"x": torch.zeros(2)},
        "scores": {"val_score": 0.5}, "config": to_yaml(Config()),
    }  # fmt: skip
    torch.save(contents, file)
    return file.getvalue()


RESULT = (
    b'{"seconds": 1.0, "mlflow": {"tracking_uri": "x", "run_id": "1"}, "trials": [{"number": 0, '
    b'"params": {"lr": 0.1}, "status": "finished", "error": null}], "verdict": {"line": "x"}}'
)
JOURNAL = (
    b'{"op": "start", "key": "a", "sequence": 0, "name": "n", "parent": null, "token": "t", '
    b'"params": {}, "tags": {}, "time": 1}\n{"sent": 0}\n{"key": "a", "run_id": "r"}\n'
)
READERS: dict[str, tuple[bytes, Callable[[Path], Any]]] = {
    "config": (
        to_yaml(Config()).encode(),
        lambda path: from_yaml(path.read_bytes(), where="x"),  # type: ignore[arg-type]
    ),
    "space": (
        b"lr: {loguniform: [0.01, 0.1]}\nlevels: {choice: [[1], [1, 2]]}\ndim: {randint: [1, 4]}",
        lambda path: read_space(str(path)),
    ),
    "result": (RESULT, read_result),
    "facts": (b'{"data set, classes": ["a"], "lr": {"uniform": [1, 2]}}', read_facts),
    "journal": (JOURNAL, read_journal),
    "model": (model_file(), load_model_file),
}


def check_lines(error: UserError) -> None:
    assert str(error).strip()
    assert all(len(line) < 2000 for line in str(error).splitlines())


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(0, len(content) + 1))
        removed = int(rng.integers(0, (9, 400)[rng.integers(2)]))
        inserted = TOKENS[rng.integers(len(TOKENS))] if rng.random() < 0.7 else rng.bytes(4)
        content = content[:at] + inserted + content[at + removed :]
    return content


@pytest.mark.parametrize(
    "inputs",
    [
        pytest.param(60, id="few"),
        pytest.param(1_000, id="many", marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
    ],
)
@pytest.mark.parametrize("name", READERS)
def test_mutated_files(tmp_path: Path, name: str, inputs: int) -> None:
    content, read = READERS[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(inputs):
        path = tmp_path / "file"
        path.write_bytes(mutated(content, np.random.default_rng(seed)))
        try:
            read(path)
        except UserError as error:
            check_lines(error)
    # KiB
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < MOST_BYTES
