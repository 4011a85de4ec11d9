"""The command line. Heavy modules are imported only when a command runs."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys

import click

from raygkd.cli.data_commands import data
from raygkd.cli.job_commands import jobs_group, submit
from raygkd.cli.machine_commands import bench, doctor, ui
from raygkd.cli.model_commands import evaluate, export, predict, promote
from raygkd.cli.options import Commands
from raygkd.cli.run_commands import compare, report, teacher, train, tune
from raygkd.errors import RunFailed, UserError, near
from raygkd.version import __version__


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="raygkd")
def commands() -> None:
    """Distil large vision models into small ones by matching graphs of their channels.

    Start with:  raygkd tune --dataset digits --trials 8
    """


for command in (
    *(export, predict, promote, submit, jobs_group),
    *(tune, compare, train, teacher, evaluate, report),
    *(data, bench, doctor, ui),
):
    commands.add_command(command)


def main() -> None:
    """Run the command line and end the process with its exit code."""
    code = run()
    # everything open has been closed; an orderly teardown of torch and Ray takes seconds
    atexit._run_exitfuncs()
    # the reader may be gone, as with head
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def run() -> int:
    """Run the command line; return 0, 2 for a user's mistake, 1 for a failure, 130 on Ctrl-C."""
    # a stopped job closes its runs like an interrupted one
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        # a command that ran elsewhere returns its exit code from there
        return commands.main(prog_name="raygkd", standalone_mode=False) or 0
    except click.ClickException as error:
        click.echo(f"error: {_in_one_line(error)}", err=True)
        return 2
    except click.Abort:
        return 130
    except UserError as error:
        for line in str(error).splitlines():
            click.echo(f"error: {line}", err=True)
        return 2
    except RunFailed as error:
        click.echo(f"error: {error}", err=True)
        return 1
    except KeyboardInterrupt:
        click.echo("stopped", err=True)
        return 130


def _in_one_line(error: click.ClickException) -> str:
    """Return the error in the command line, and where to find help."""
    context = getattr(error, "ctx", None)
    text = " ".join(error.format_message().split()).removesuffix(".")
    if isinstance(error, click.NoSuchOption) and context is not None:
        known = [flag for param in context.command.params for flag in param.opts]
        text = f"no option {error.option_name}{near(error.option_name, known)}"
    text = text[:1].lower() + text[1:]
    return f"{text} (try '{context.command_path} --help')" if context is not None else text
