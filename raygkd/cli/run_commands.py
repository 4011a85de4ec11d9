"""Runs and their reports: ``raygkd tune``, ``compare``, ``train``, ``teacher`` and ``report``."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import click

from raygkd.cli.options import (
    CONFIG,
    JSON,
    RESUME,
    RunCommand,
    only_results_on_stdout,
    resolve,
    setting_options,
)
from raygkd.cli.show import show_comparison, show_search, show_single


def _run_command(name: str) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        function = JSON(RESUME(CONFIG(setting_options(name)(function))))
        return click.command(name, cls=RunCommand)(function)

    return decorate


def _execute(
    command: str,
    config_file: str | None,
    resume: str | None,
    as_json: bool,
    options: dict[str, Any],
    show: Callable[[Any, dict[str, Any]], None],
) -> None:
    config, folder = resolve(command, config_file, options, resume)
    with only_results_on_stdout() as out:
        from raygkd.report.console import WarningsToConsole, console_of, stderr_console

        logging.getLogger("raygkd").handlers = [WarningsToConsole()]
        result = _workflow(command)(config, console=stderr_console(), resume=folder)
        if as_json:
            out.write(json.dumps(result) + "\n")
        else:
            show(console_of(out), result)


def _workflow(command: str) -> Callable[..., dict[str, Any]]:
    """Return what a command does, imported only now."""
    from raygkd.workflows.compare import compare
    from raygkd.workflows.train import distil, teach
    from raygkd.workflows.tune import tune

    return {"tune": tune, "compare": compare, "train": distil, "teacher": teach}[command]


@_run_command("tune")
def tune(config_file: str | None, resume: str | None, as_json: bool, **options: Any) -> None:
    """Search the method's settings; end with a tuned, compared student.

    ASHA draws the settings from the search space, or from --space, and stops the trials that fall
    behind. The teacher is trained first unless --teacher is a model file, and kept for the next
    run.
    """
    _execute("tune", config_file, resume, as_json, options, show_search)


@_run_command("compare")
def compare(config_file: str | None, resume: str | None, as_json: bool, **options: Any) -> None:
    """Train methods side by side, with the same images, recipe and seeds; rank them.

    Each method trains as often as --seeds says, as many at a time as there is room for. The table
    has mean and standard deviation on the test split, the p-value against the best of the others'
    methods, and what a training step costs in time and memory.
    """
    _execute("compare", config_file, resume, as_json, options, show_comparison)


@_run_command("train")
def train(config_file: str | None, resume: str | None, as_json: bool, **options: Any) -> None:
    """Distil one student with the settings given.

    The teacher is trained first unless --teacher is a model file, and kept for the next run.
    """
    _execute("train", config_file, resume, as_json, options, show_single)


@_run_command("teacher")
def teacher(config_file: str | None, resume: str | None, as_json: bool, **options: Any) -> None:
    """Train a teacher alone; the model file it writes is for --teacher.

    --teacher is the name of the model and --epochs how long it trains. --student and --method are
    not used; they are here so that all commands take them.
    """
    _execute("teacher", config_file, resume, as_json, options, show_single)


@click.command("report")
@click.argument("output")
@click.option(
    "--html",
    metavar="FILE",
    help="where the page is written; its pictures lie beside it [default: RUN/report/index.html]",
)
@JSON
def report(output: str, html: str | None, as_json: bool) -> None:
    """Write a page of pictures on a run that is over.

    OUTPUT is an output folder, whose newest finished run is meant, or the folder of a run (s3://
    and gs:// work). The page is one HTML file that needs nothing beside itself.
    """
    with only_results_on_stdout() as out:
        from raygkd.report.console import WarningsToConsole, console_of, stderr_console
        from raygkd.workflows.report import write_report

        logging.getLogger("raygkd").handlers = [WarningsToConsole()]
        result = write_report(output, html, console=stderr_console())
        if as_json:
            out.write(json.dumps(result) + "\n")
            return
        console = console_of(out)
        for line in result["left_out"]:
            console.print(f"left out  {line}", soft_wrap=True)
        folder = result["html"].rpartition("/")[0]
        console.print(f"pictures  {len(result['pictures'])} PNG files in {folder}", soft_wrap=True)
        console.print(f"page      {result['html']}", soft_wrap=True)
