"""The blocks of the quickstart, run one after the other as they stand there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import FOREIGN

PAGE = Path(__file__).parents[2] / "docs" / "quickstart.md"
# blocks that are not run: the first makes an environment, others are drawings or output
COMMAND = "raygkd "
# serves until Ctrl-C; tests/tracking/test_mlflow_server.py runs it
SERVER = "raygkd ui"


def steps() -> list[str]:
    """Return the commands of the page, and its program, in their order."""
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", PAGE.read_text(), re.S | re.M):
        lines = [line for line in block.splitlines() if line.startswith(COMMAND)]
        found += [block] if language == "python" else [line for line in lines if line != SERVER]
    return found


@pytest.mark.slow
def test_the_quickstart_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in FOREIGN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    asked = steps()
    assert len(asked) == 9
    for step in asked:
        shell = step.startswith(COMMAND)
        command = ["bash", "-c", step] if shell else [sys.executable, "-c", step]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
        assert ran.returncode == 0, f"{step}\n{ran.stdout}{ran.stderr}"
    run = tmp_path / "raygkd-output" / "runs" / "tune-first"
    for path in (
        *(tmp_path / "sheet.png", run / "report" / "index.html"),
        *(tmp_path / "drawn", tmp_path / "student.onnx"),
    ):
        assert path.exists()
    lines = map(json.loads, (tmp_path / "found.jsonl").read_text().splitlines())
    threes = [line["predictions"][0]["class"] == "3" for line in lines]
    assert sum(threes) > 0.5 * len(threes)
