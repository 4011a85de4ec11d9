"""Runs and their reports: ``raygkd tune``, ``compare``, ``train``, ``teacher`` and ``report``."""

from __future__ import annotations

import importlib
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
from raygkd.config import Config


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
    if folder is None:
        _check(command, config)
    with only_results_on_stdout() as out:
        from raygkd.report.console import WarningsToConsole, console_of, stderr_console

        logging.getLogger("raygkd").handlers = [WarningsToConsole()]
        result = workflow(command)(config, console=stderr_console(), resume=folder)
        if as_json:
            out.write(json.dumps(result) + "\n")
        else:
            show(console_of(out), result)


def _check(command: str, config: Config) -> None:
    # needs numpy, which --help does not
    from raygkd.workflows.early_checks import check_early

    check_early(command, config)


# command -> module and name of what runs it
_WORKFLOWS = {
    "tune": ("tune", "tune"),
    "compare": ("compare", "compare"),
    "train": ("train", "distil"),
    "teacher": ("train", "teach"),
}


def workflow(command: str) -> Callable[..., dict[str, Any]]:
    """Return the function that runs a command; it is imported only now, and no other."""
    module, name = _WORKFLOWS[command]
    return getattr(importlib.import_module(f"raygkd.workflows.{module}"), name)


@_run_command("tune")
def tune(config_file: str | None, resume: str | None, as_json: bool, **options: Any) -> None:
    """Search the method's settings, and compare the tuned student with its baselines.

    The first trials have the default settings and those of kd; the settings of the others are
    drawn from the search space, or from --space. ASHA stops trials that fall behind. The last line
    is a verdict: whether distillation has improved the student.
    The teacher is trained first unless it is already trained (see --teacher-mode); later runs
    reuse it.
    """
    _execute("tune", config_file, resume, as_json, options, show_search)


@_run_command("compare")
def compare(config_file: str | None, resume: str | None, as_json: bool, **options: Any) -> None:
    """Train and rank methods with the same images, recipe and seeds.

    Each method is trained with --seeds seeds, as many runs at a time as fit. The table shows the
    mean and standard deviation on the test split, the p-value against the best published method,
    and the time and memory of a training step.
    """
    _execute("compare", config_file, resume, as_json, options, show_comparison)


@_run_command("train")
def train(config_file: str | None, resume: str | None, as_json: bool, **options: Any) -> None:
    """Distil one student with the given settings.

    With --control the last line says whether it is better than the same student alone.
    The teacher is trained first unless it is already trained (see --teacher-mode); later runs
    reuse it.
    """
    _execute("train", config_file, resume, as_json, options, show_single)


@_run_command("teacher")
def teacher(config_file: str | None, resume: str | None, as_json: bool, **options: Any) -> None:
    """Train a teacher alone, and write a model file for --teacher.

    --teacher is the name of the model, --epochs its number of epochs. --student and --method are
    accepted, but have no effect.
    """
    _execute("teacher", config_file, resume, as_json, options, show_single)


@click.command("report")
@click.argument("output")
@click.option(
    "--html",
    metavar="FILE",
    help="file to write; its pictures are stored next to it [default: RUN/report/index.html]",
)
@JSON
def report(output: str, html: str | None, as_json: bool) -> None:
    """Write a report page with pictures of a finished run.

    OUTPUT is the folder of a run, or an output folder for its newest finished run (s3:// and gs://
    work). The page is a single self-contained HTML file.
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
