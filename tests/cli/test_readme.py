"""README and the reference say what is so."""

from __future__ import annotations

import importlib
import re
import tomllib
from pathlib import Path
from statistics import mean, stdev

import click
import pytest
from write_reference import PARTS, shown

from raygkd.cli.main import commands as raygkd

ROOT = Path(__file__).parents[2]


def commands() -> list[str]:
    """Return the two commands that each do everything."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [block.strip() for block in blocks[:2]]


def test_first_command_installs_and_runs_the_main_job() -> None:
    assert commands()[0].startswith("python3.11 -m venv .venv && ")
    assert " .venv/bin/raygkd tune --dataset cluttered-digits --trials 4 " in commands()[0]


def test_second_command_is_what_is_run_before_a_change_lands() -> None:
    assert commands()[1].endswith("pytest")
    assert commands()[1] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_pyproject_has_the_build_system_alone() -> None:
    assert list(tomllib.loads((ROOT / "pyproject.toml").read_text())) == ["build-system"]


def test_every_command_is_in_the_table_of_commands() -> None:
    page = (ROOT / "docs" / "reference" / "commands.md").read_text()
    told = set(re.findall(r"`raygkd ([a-z ]+)`", page))
    names = set(raygkd.commands) - {"data"}
    group = raygkd.commands["data"]
    assert isinstance(group, click.Group)
    assert names | {f"data {name}" for name in group.commands} <= told


@pytest.mark.parametrize("part", PARTS)
def test_the_reference_is_what_the_code_says(part: str) -> None:
    """`python tests/cli/write_reference.py` writes these parts."""
    assert shown(part) == PARTS[part][1]()


def test_the_readme_can_be_read_in_one_sitting() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_results_are_those_of_the_runs_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests" / "benchmarks")
    runs = importlib.import_module("plot_results")
    table = (ROOT / "README.md").read_text().partition("## Results")[2].partition("\n![")[0]
    rows = [line.translate({ord(c): None for c in "*`"}) for line in table.splitlines()]
    cells = {row.split(" | ")[0].lstrip("| "): row.split(" | ")[1:] for row in rows if "0." in row}
    for label, (_, losses) in runs.CURVES.items():
        [shown] = [row for name, row in cells.items() if name.startswith(label.split(" (")[0])]
        figures = [figure.strip(" |") for figure in shown if figure.strip(" |")]
        assert figures == [
            f"{mean(seeds):.3f}" + (f" ({stdev(seeds):.3f})" if len(seeds) > 1 else "")
            for seeds in runs.accuracies(losses).values()
        ]
