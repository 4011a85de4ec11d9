"""The command line. It imports nothing heavy until a command runs."""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import signal
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from raygkd import __version__, resuming
from raygkd import config as configuration
from raygkd.config import Config
from raygkd.errors import ConfigError, RunFailed, UserError, near

# what only a student's distillation knows; its method is an option of every command
_DISTILLATION = {
    name for name, (section, _, _) in configuration.settings().items() if section == "method"
} - {"method"} | {"inherit", "student_weights"}
# sections and settings that a command has no options for; all others are options of every command
_WITHOUT = {
    "teacher": {"search", "teacher_epochs"} | _DISTILLATION,
    "train": {"search"},
    "tune": set(),
}


# command -> function of raygkd.workflows
WORKFLOWS = {"tune": "tune", "train": "distil", "teacher": "teach"}


class _Commands(click.Group):
    """A group that answers a misspelled command with the near ones, and none at all with help."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["--help"])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None:
            known = self.list_commands(ctx)
            raise click.UsageError(
                f"no command {args[0]!r}{near(args[0], known)} (commands: {', '.join(known)})"
            )
        return super().resolve_command(ctx, args)


class _RunCommand(click.Command):
    """A command whose help lists the settings by section, as a YAML file has them."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        known = configuration.settings()
        groups: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            section = known[param.name][0] if param.name in known else "Options"
            if record is not None:
                groups.setdefault(section.capitalize(), []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="raygkd")
def commands() -> None:
    """Distil large vision models into small ones by matching graphs of their channels.

    Start with:  raygkd tune --dataset digits --trials 8
    """


def main() -> None:
    """Run the command line and end the process with its exit code."""
    code = run()
    # what is open has been closed; to take apart all that torch and Ray have loaded takes seconds
    atexit._run_exitfuncs()
    # whoever reads may have left, as head does
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def run() -> int:
    """Run the command line; return 0, 2 for a user's mistake, 1 for a failure, 130 on Ctrl-C."""
    # a job that is stopped closes its runs just as one that is interrupted
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        commands.main(prog_name="raygkd", standalone_mode=False)
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
    return 0


def _in_one_line(error: click.ClickException) -> str:
    """Return what is wrong with the command line, and where its help is."""
    context = getattr(error, "ctx", None)
    text = " ".join(error.format_message().split()).removesuffix(".")
    if isinstance(error, click.NoSuchOption) and context is not None:
        known = [flag for param in context.command.params for flag in param.opts]
        text = f"no option {error.option_name}{near(error.option_name, known)}"
    text = text[:1].lower() + text[1:]
    return f"{text} (try '{context.command_path} --help')" if context is not None else text


class _List(click.ParamType):
    """Values of one kind with commas between them.

    Args:
        kind: int, float or str.
    """

    name = "A,B,..."

    def __init__(self, kind: type):
        self._kind = kind

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        try:
            return tuple(self._kind(part) for part in value.split(","))
        except ValueError:
            whole = "whole numbers" if self._kind is int else "numbers"
            self.fail(f"{value!r} must be {whole} with commas between them", param, ctx)


def _option_type(kind: Any, choices: tuple[str, ...] | None) -> Any:
    base = configuration.base_type(kind)
    if typing.get_origin(base) is tuple:
        return _List(typing.get_args(base)[0])
    return click.Choice(choices) if choices else base


def _setting_options(command: str) -> Callable[[Any], Any]:
    """Return a decorator that adds an option for every setting a command uses."""

    def decorate(function: Any) -> Any:
        for name, (section, leaf, kind) in reversed(configuration.settings().items()):
            if {section, name} & _WITHOUT[command]:
                continue
            text = leaf.metadata["help"]
            if leaf.default is not None and leaf.default is not False and "[default" not in text:
                text += f" [default: {_shown(leaf.default)}]"
            if configuration.base_type(kind) is bool:
                flags = f"{configuration.flag(name)}/--no-{name.replace('_', '-')}"
                option = click.option(flags, name, default=None, help=text)
            else:
                option = click.option(
                    configuration.flag(name),
                    name,
                    type=_option_type(kind, leaf.metadata["choices"]),
                    default=None,
                    help=text,
                )
            function = option(function)
        return function

    return decorate


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


_CONFIG = click.option(
    "--config", "config_file", metavar="FILE", help="YAML file of settings; options override it"
)
_RESUME = click.option(
    "--resume",
    metavar="FOLDER",
    help="go on with the run in this folder, or with the newest one that was broken off in this "
    "output folder",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="print the result as JSON on stdout")


def _run_command(name: str) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        function = _JSON(_RESUME(_CONFIG(_setting_options(name)(function))))
        return commands.command(name, cls=_RunCommand)(function)

    return decorate


def resolve(
    command: str, config_file: str | None, options: Mapping[str, Any], resume: str | None
) -> tuple[Config, Path | None]:
    """Return the configuration of a command, and the folder of the run it resumes.

    Defaults are overridden by ``--config``, and that by the options. A run is resumed with its own
    configuration; what is given beside ``--resume`` must be the same.

    Raises:
        ConfigError: unreadable files, unknown keys, values that are not allowed.
    """
    known = configuration.settings()
    tree = _config_tree(config_file) if config_file is not None else {}
    for name, value in options.items():
        if value is not None:
            tree.setdefault(known[name][0], {})[name] = value
    if resume is None:
        return configuration.from_mapping(tree, where=config_file or "options"), None
    folder = resuming.run_folder(resume, command)
    asked = {name: value for leaves in tree.values() for name, value in leaves.items()}
    return resuming.own_config(folder, asked), folder


def _config_tree(config_file: str) -> dict[str, Any]:
    """Return the settings of a YAML file, by section."""
    try:
        text = Path(config_file).read_bytes()
    except OSError as error:
        raise ConfigError(f"--config {config_file}: cannot be read: {error.strerror}") from error
    tree = configuration.yaml_mapping(text, where=config_file)
    configuration.check_keys(tree, where=config_file)
    return tree


@contextlib.contextmanager
def _only_results_on_stdout() -> Iterator[Any]:
    """Send whatever is written to standard output to standard error; yield the real one."""
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(real), "w") as out:
            yield out
    finally:
        sys.stdout.flush()
        os.dup2(real, 1)
        os.close(real)


def _execute(
    command: str,
    config_file: str | None,
    resume: str | None,
    as_json: bool,
    options: dict[str, Any],
    show: Callable[[Any, dict[str, Any]], None],
) -> None:
    config, folder = resolve(command, config_file, options, resume)
    with _only_results_on_stdout() as out:
        from raygkd import workflows
        from raygkd.report.console import WarningsToConsole, console_of, stderr_console

        logging.getLogger("raygkd").handlers = [WarningsToConsole()]
        workflow = getattr(workflows, WORKFLOWS[command])
        result = workflow(config, console=stderr_console(), resume=folder)
        if as_json:
            out.write(json.dumps(result) + "\n")
        else:
            show(console_of(out), result)


@_run_command("tune")
def tune(config_file: str | None, resume: str | None, as_json: bool, **options: Any) -> None:
    """Search the method's settings; end with a tuned, compared student.

    ASHA draws the settings from the search space, or from --space, and stops the trials that fall
    behind. The teacher is trained first unless --teacher is a model file, and kept for the next
    run.
    """
    _execute("tune", config_file, resume, as_json, options, _show_search)


@_run_command("train")
def train(config_file: str | None, resume: str | None, as_json: bool, **options: Any) -> None:
    """Distil one student with the settings given.

    The teacher is trained first unless --teacher is a model file, and kept for the next run.
    """
    _execute("train", config_file, resume, as_json, options, _show_single)


@_run_command("teacher")
def teacher(config_file: str | None, resume: str | None, as_json: bool, **options: Any) -> None:
    """Train a teacher alone; the model file it writes is for --teacher.

    --teacher is the name of the model and --epochs how long it trains. --student and --method are
    not used; they are here so that all commands take them.
    """
    _execute("teacher", config_file, resume, as_json, options, _show_single)


def _show_search(out: Any, result: dict[str, Any]) -> None:
    from raygkd.report.tables import missing_scores, models_table, repeat_table, trials_table

    best, alone, teacher = result["best"], result["student_alone"], result["teacher"]
    rows = [
        ("teacher", teacher["model"], teacher["parameters"], teacher["test_score"]),
        ("student alone", alone["model"], alone["parameters"], alone["test_score"]),
        ("best student", best["model"], best["parameters"], best["test_score"]),
    ]
    out.print(trials_table(result["trials"]))
    out.print(models_table(rows))
    if result["repeat"] is not None:
        out.print(repeat_table(best["model"], result["repeat"]))
        for line in missing_scores(result["repeat"]):
            out.print(line, soft_wrap=True)
    out.print(f"curves      {Path(result['run']) / 'search.png'}", soft_wrap=True)
    _show_next(out, result)


def _show_single(out: Any, result: dict[str, Any]) -> None:
    from raygkd.report.tables import models_table

    rows = [
        (role, model["model"], model["parameters"], model["test_score"])
        for role, model in result["models"].items()
    ]
    out.print(models_table(rows))
    out.print(f"validation score {result['val_score']:.4f}")
    _show_next(out, result)


def _show_next(out: Any, result: dict[str, Any]) -> None:
    run = Path(result["run"])
    output = run.parent.parent
    out.print(f"model file  {run / 'model.pt'}", soft_wrap=True)
    out.print(f"all of it   {run / 'result.json'}", soft_wrap=True)
    uri = result["mlflow"]["tracking_uri"]
    if uri.startswith("sqlite"):
        out.print(f"compare     raygkd ui --output {output}", soft_wrap=True)
    else:
        out.print(f"compare     {uri}", soft_wrap=True)


@commands.group(cls=_Commands)
def data() -> None:
    """Prepare images as Parquet shards, and look at them."""


@data.command("prepare")
@click.option(
    "--dataset",
    required=True,
    help="digits, cifar10, cifar100, imagefolder, digits-voc, voc or coco",
)
@click.option("--data-dir", type=str, help="folder the data set is read from")
@click.option(
    "--download", is_flag=True, help="fetch cifar10, cifar100 or voc when it is not there"
)
@click.option(
    "--years",
    type=_List(str),
    default="2007,2012",
    show_default=True,
    help="voc: whose trainval images are for training",
)
@click.option("--classes", type=_List(str), help="boxes of these classes only [default: all]")
@click.option("--strict", is_flag=True, help="refuse faulty annotations instead of dropping them")
@click.option("--output", required=True, help="new folder for the shards (s3:// and gs:// work)")
@click.option("--skip-bad", is_flag=True, help="leave out unreadable images, counted")
@_JSON
def data_prepare(
    dataset: str,
    data_dir: str | None,
    download: bool,
    years: tuple[str, ...],
    classes: tuple[str, ...] | None,
    strict: bool,
    output: str,
    skip_bad: bool,
    as_json: bool,
) -> None:
    """Turn a data set into Parquet shards."""
    with _only_results_on_stdout() as out:
        from raygkd.data.prepare import prepare
        from raygkd.data.sources import open_source
        from raygkd.report.console import progress, stderr_console

        if dataset == "parquet":
            raise ConfigError(
                "--dataset parquet: is prepared already, train on it with --data-dir "
                f"{data_dir or 'PATH'}"
            )
        source = open_source(
            dataset, data_dir, download, strict=strict, years=years, classes=classes
        )
        with progress(stderr_console(), "preparing images") as advance:
            summary = prepare(source, output, skip_bad=skip_bad, progress=advance)
        if as_json:
            out.write(json.dumps(summary) + "\n")
            return
        splits = ", ".join(f"{name} {count}" for name, count in summary["splits"].items())
        out.write(
            f"{summary['images']} images of {summary['classes']} classes ({splits}) in "
            f"{summary['shards']} shard(s), {summary['bytes']:,} bytes, at {output}\n"
        )
        if summary["bad"]:
            examples = "; ".join(summary["bad_examples"])
            out.write(f"left out {summary['bad']} unreadable images: {examples}\n")
        out.write(f"next: raygkd tune --dataset parquet --data-dir {output}\n")


@data.command("info")
@click.argument("path")
@click.option("--sheet", default="sheet.png", show_default=True, help="PNG of sample images")
@_JSON
def data_info(path: str, sheet: str, as_json: bool) -> None:
    """Show counts, classes and sizes of shards; write a sample sheet.

    PATH is a .parquet file or a folder of shards (s3:// and gs:// work).
    """
    with _only_results_on_stdout() as out:
        from raygkd.data.inspect import sample_sheet, table_info
        from raygkd.data.parquet import open_table
        from raygkd.report.console import console_of
        from raygkd.report.tables import classes_table, info_table

        table = open_table(path)
        info = table_info(table)
        sample_sheet(table, sheet)
        if as_json:
            out.write(json.dumps({**info, "sheet": sheet}) + "\n")
            return
        console = console_of(out)
        console.print(info_table(info))
        console.print(classes_table(info["classes"]))
        console.print(f"sample sheet: {sheet}", soft_wrap=True)


@commands.command()
@click.option("--output", default="raygkd-output", show_default=True, help="output folder of runs")
@click.option(
    "--port", default=5000, show_default=True, type=click.IntRange(1, 65535), help="TCP port"
)
def ui(output: str, port: int) -> None:
    """Open the MLflow UI over an output folder, on 127.0.0.1.

    Ctrl-C ends it.
    """
    from raygkd.ui import serve

    serve(Path(output), port)
