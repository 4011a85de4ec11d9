"""README says what is so."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import click
from print_options import table

from raygkd.cli.main import commands as raygkd

ROOT = Path(__file__).parents[2]


def commands() -> list[str]:
    """Return the two commands that each do everything."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [block.strip() for block in blocks[:2]]


def test_first_command_installs_and_runs_the_main_job() -> None:
    assert commands()[0].startswith("python3.11 -m venv .venv && ")
    assert commands()[0].endswith("raygkd tune --dataset digits --trials 8")


def test_second_command_is_what_is_run_before_a_change_lands() -> None:
    assert commands()[1].endswith("pytest")
    assert commands()[1] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_pyproject_has_the_build_system_alone() -> None:
    assert list(tomllib.loads((ROOT / "pyproject.toml").read_text())) == ["build-system"]


def test_every_command_is_in_the_table_of_commands() -> None:
    told = set(re.findall(r"`raygkd ([a-z ]+)`", (ROOT / "README.md").read_text()))
    names = set(raygkd.commands) - {"data"}
    group = raygkd.commands["data"]
    assert isinstance(group, click.Group)
    assert names | {f"data {name}" for name in group.commands} <= told


def test_the_table_of_options_is_what_the_code_says() -> None:
    """`python tests/cli/print_options.py` prints what must stand between the two marks."""
    text = (ROOT / "README.md").read_text()
    [shown] = re.findall(r"<!-- options -->\n(.*?)\n<!-- end of options -->", text, re.DOTALL)
    assert shown == table()
