"""Shells complete commands, options, values and files, as the docs say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "commands.md").read_text()


def answer(shell: str, line: str = "") -> str:
    words = line.split(" ")
    environment = {
        **os.environ,
        "_RAYGKD_COMPLETE": shell,
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-m", "raygkd"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_of_the_shells(shell: str) -> None:
    assert f"_RAYGKD_COMPLETE={shell}_source raygkd" in PAGE
    assert f"_RAYGKD_COMPLETE={shell}_complete" in answer(f"{shell}_source")


@pytest.mark.parametrize(
    ("line", "completions"),
    [
        ("raygkd ex", ["plain,export"]),
        ("raygkd export --qu", ["plain,--quantize"]),
        ("raygkd export --format s", ["plain,safetensors"]),
        ("raygkd predict mod", ["file,mod"]),
        ("raygkd predict model.pt x --draw f", ["dir,f"]),
    ],
)
def test_completions(line: str, completions: list[str]) -> None:
    assert answer("bash_complete", line).splitlines() == completions
