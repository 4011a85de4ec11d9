"""The command line on terminals and in folders of all kinds, as processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

COMMAND = [sys.executable, "-m", "raygkd"]
REPOSITORY = Path(__file__).parents[2]


def run(*arguments: str, shell: str = "", cwd: Path, **environment: str) -> tuple[int, str, str]:
    """Return exit code, standard output and standard error; ``shell`` redirects its streams."""
    # the shell opens or closes the streams as a user's does
    ran = subprocess.run(
        ["sh", "-c", f'exec "$@" {shell}', "sh", *COMMAND, *arguments],
        cwd=cwd,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        timeout=120,
    )
    return ran.returncode, ran.stdout.decode(), ran.stderr.decode()


@pytest.mark.parametrize("name", ["Fotos-für-später", "写真"])
@pytest.mark.parametrize("encoding", ["C", "POSIX", "C.UTF-8"])
def test_names_are_printed_in_every_locale(tmp_path: Path, name: str, encoding: str) -> None:
    code, _, said = run("tune", "--config", name, cwd=tmp_path, LC_ALL=encoding, PYTHONUTF8="0")
    assert code == 2
    [line] = said.splitlines()
    assert line.startswith("error: --config ")
    shown = name.encode("ascii", "backslashreplace").decode()
    assert name in line or shown in line or "?" in line


@pytest.mark.parametrize(
    ("shell", "code"),
    [(">/dev/full", 1), (">&-", 0), ("2>&-", 0), (">&- 2>&- <&-", 0), ("2>/dev/full", 0)],
)
def test_results_that_cannot_be_written(tmp_path: Path, shell: str, code: int) -> None:
    got, _, said = run("init", shell=shell, cwd=tmp_path)
    assert got == code
    assert "Traceback" not in said
    if code:
        assert said == "error: cannot write the results: No space left on device\n"


@pytest.mark.parametrize("shell", ["2>/dev/full", "2>&-", ">&- 2>&-"])
def test_a_mistake_that_cannot_be_reported_has_its_exit_code(tmp_path: Path, shell: str) -> None:
    assert run("tune", "--config", "nowhere", shell=shell, cwd=tmp_path)[0] == 2


def test_a_working_folder_that_was_removed(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    ran = subprocess.run(
        ["sh", "-c", f'rmdir "{gone}"; exec "$@"', "sh", *COMMAND, "init"],
        cwd=gone,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        timeout=120,
    )
    assert (ran.returncode, ran.stderr) == (
        2,
        "error: the working folder no longer exists; change to another one\n",
    )
