"""The command line. Heavy modules are imported only when a command runs."""

from __future__ import annotations

import atexit
import codecs
import contextlib
import errno
import locale
import os
import signal
import sys
from typing import Any

import click

from raygkd.cli.data_commands import data
from raygkd.cli.job_commands import jobs_group, submit
from raygkd.cli.machine_commands import bench, doctor, ui
from raygkd.cli.model_commands import evaluate, export, predict, promote
from raygkd.cli.options import Commands
from raygkd.cli.run_commands import compare, report, teacher, train, tune
from raygkd.cli.start_commands import init
from raygkd.errors import (
    ConfigError,
    RunFailed,
    UserError,
    brief,
    control_characters,
    near,
)
from raygkd.registry import either
from raygkd.storage.terminal import leave_closed_terminal
from raygkd.version import __version__


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="raygkd")
def commands() -> None:
    """Distil large vision models into small ones by matching graphs of their channels.

    Start with:  raygkd init
    """


for command in (
    *(export, predict, promote, submit, jobs_group),
    *(tune, compare, train, teacher, evaluate, report),
    *(init, data, bench, doctor, ui),
):
    commands.add_command(command)


def main() -> None:
    """Run the command line and end the process with its exit code."""
    _in_utf8()
    _open_streams()
    code = run()
    # everything open has been closed; an orderly teardown of torch and Ray takes seconds
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        # the reader may be gone, as with head, or the disk full
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _in_utf8() -> None:
    """Start again in UTF-8 mode, if Python's texts are in the locale's encoding.

    So files and names are UTF-8 in every process of a run; the terminal gets its own encoding.
    """
    encoding = locale.getencoding() if sys.version_info >= (3, 11) else ""
    if sys.flags.utf8_mode or codecs.lookup(encoding).name == "utf-8" or not sys.executable:
        return
    os.environ["PYTHONUTF8"] = "1"
    os.environ.setdefault("PYTHONIOENCODING", f"{encoding}:backslashreplace")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _open_streams() -> None:
    """Let every character be printed, and replace standard streams that are closed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # the lowest free number, so that no other file gets it
            opened = os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def run() -> int:
    """Run the command line; return 0, 2 for a user's mistake, 1 for a failure, 130 on Ctrl-C."""
    # a stopped job closes its runs like an interrupted one
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # so does one whose terminal was closed, unless nohup has it go on
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _on_hangup)
    try:
        _check_arguments()
        # a command that ran elsewhere returns its exit code from there
        return commands.main(prog_name="raygkd", standalone_mode=False) or 0
    except click.ClickException as error:
        _print_error(_in_one_line(error))
        return 2
    except click.Abort:
        return 130
    except UserError as error:
        lines = str(error).splitlines()
        for line in lines[:MOST_LINES]:
            _print_error(line)
        if len(lines) > MOST_LINES:
            _print_error(f"{len(lines) - MOST_LINES:,} more like these")
        return 2
    except RunFailed as error:
        _print_error(str(error))
        return 1
    except OSError as error:
        # of a stream, which has no name: its reader is gone, as with head, or its disk full
        if error.filename is not None or error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO):
            raise
        if error.errno != errno.EPIPE:
            _print_error(f"cannot write the results: {error.strerror}")
        return 1
    except MemoryError as error:
        # NumPy says how much it asked for
        wanted = " ".join(str(error).split())
        _print_error(f"the memory of this machine is not enough{wanted and f' ({wanted})'}")
        return 1
    except KeyboardInterrupt:
        click.echo("stopped", err=True)
        return 130


def _on_hangup(number: int, frame: Any) -> None:
    leave_closed_terminal()
    raise KeyboardInterrupt


def _print_error(line: str) -> None:
    """Print an error on any terminal; a closed or full one cannot be told anything."""
    with contextlib.suppress(OSError):
        click.echo(f"error: {line}", err=True)


# problems that are printed, of a file with very many
MOST_LINES = 20
# files of which a second one would replace the first without a word
ONCE = ("--config", "--space", "--resume")


def _check_arguments() -> None:
    """Refuse a lost working folder, and arguments that are empty, repeated, or break lines."""
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError("the working folder no longer exists; change to another one") from error
    before = ""
    named: set[str] = set()
    for argument in sys.argv[1:]:
        if argument == "--":
            return
        option, equals, value = argument.partition("=")
        if unseen := control_characters(argument):
            raise ConfigError(f"{brief(argument)}: contains {unseen}; choose another")
        if not argument or (equals and not value and option.startswith("--")):
            empty = option or (before if before.startswith("-") else "an argument")
            raise ConfigError(f"{empty} '': is empty; omit it, or pass a value")
        if option in named and option in ONCE:
            raise ConfigError(f"{option}: is given twice; pass one file")
        named |= {option} if option.startswith("--") else set()
        before = argument


def _in_one_line(error: click.ClickException) -> str:
    """Return the error in the command line, and where to find help."""
    context = getattr(error, "ctx", None)
    text = " ".join(error.format_message().split()).removesuffix(".")
    if isinstance(error, click.NoSuchOption) and context is not None:
        text = f"no option {error.option_name}{_meant(error.option_name, context)}"
    text = text[:1].lower() + text[1:]
    return f"{text} (try '{context.command_path} --help')" if context is not None else text


def _meant(option: str, context: click.Context) -> str:
    """Return a hint at options that are named like one, or else at the commands that have it."""
    # the dashes would make all names alike
    names = [flag.removeprefix("--") for flag in _options(context.command)]
    if close := near(option.lstrip("-"), names):
        return close.replace(" '", " '--")
    root = context.find_root()
    assert isinstance(root.command, click.Group)
    commands = root.command.commands.items()
    owners = [name for name, command in commands if option in _options(command)]
    return f"; it is an option of {either(owners)}" if owners else ""


def _options(command: click.Command) -> list[str]:
    return [flag for param in command.params for flag in param.opts if flag.startswith("--")]
