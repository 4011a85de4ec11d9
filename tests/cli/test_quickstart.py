"""The blocks of the quickstart, run one after the other as they stand there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from shown_blocks import run_block, run_by


@pytest.mark.slow
def test_the_quickstart_runs_from_top_to_bottom(tmp_path: Path) -> None:
    steps = run_by("tests/cli/test_quickstart.py", "docs/quickstart.md")
    assert len(steps) == 5
    for step in steps:
        run_block(step, tmp_path)
    run = tmp_path / "raygkd-output" / "runs" / "tune-first"
    for path in (
        *(tmp_path / "sheet.png", run / "report" / "index.html"),
        *(tmp_path / "drawn", tmp_path / "student.onnx"),
    ):
        assert path.exists()
    lines = map(json.loads, (tmp_path / "found.jsonl").read_text().splitlines())
    threes = [line["predictions"][0]["class"] == "3" for line in lines]
    assert sum(threes) > 0.5 * len(threes)
