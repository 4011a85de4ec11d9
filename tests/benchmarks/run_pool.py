"""Runs side by side, a JSON line for each; what the file of results has is not run again."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def read_lines(results: Path) -> list[Line]:
    """Return the lines of a file of results; none if there is no file."""
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text().splitlines()]


def run_missing(
    run_one: Callable[[Mapping[str, Any]], Line],
    asked: Sequence[Mapping[str, Any]],
    results: Path,
    *,
    key: Sequence[str],
    at_once: int,
    describe: Callable[[Line], str],
) -> None:
    """Run what the results lack, each in a process of its own, and append the lines as they come.

    Args:
        run_one: takes one of ``asked``, returns its line.
        key: names that tell runs apart, in ``asked`` and in the lines.
        describe: the text to print for a line.
    """
    known = {tuple(line[name] for name in key) for line in read_lines(results)}
    missing = [one for one in asked if tuple(one[name] for name in key) not in known]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(at_once, mp_context=spawn) as pool:
        for done in as_completed([pool.submit(run_one, one) for one in missing]):
            line = done.result()
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(describe(line), flush=True)
