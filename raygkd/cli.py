"""The command line. It imports nothing heavy until a command runs."""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from raygkd import __version__
from raygkd.errors import ConfigError, RunFailed, UserError, near
from raygkd.files import is_remote
from raygkd.job_commands import jobs_group, submit
from raygkd.model_commands import export, predict, promote
from raygkd.options import (
    CONFIG,
    JSON,
    RESUME,
    Commands,
    ListType,
    RunCommand,
    only_results_on_stdout,
    resolve,
    setting_options,
)

# command -> function of raygkd.workflows, of those that make a run
WORKFLOWS = {"tune": "tune", "compare": "compare", "train": "distil", "teacher": "teach"}


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="raygkd")
def commands() -> None:
    """Distil large vision models into small ones by matching graphs of their channels.

    Start with:  raygkd tune --dataset digits --trials 8
    """


commands.add_command(export)
commands.add_command(predict)
commands.add_command(promote)
commands.add_command(submit)
commands.add_command(jobs_group)


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
        # a command that runs elsewhere returns the exit code that it had there
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
    """Return what is wrong with the command line, and where its help is."""
    context = getattr(error, "ctx", None)
    text = " ".join(error.format_message().split()).removesuffix(".")
    if isinstance(error, click.NoSuchOption) and context is not None:
        known = [flag for param in context.command.params for flag in param.opts]
        text = f"no option {error.option_name}{near(error.option_name, known)}"
    text = text[:1].lower() + text[1:]
    return f"{text} (try '{context.command_path} --help')" if context is not None else text


def _run_command(name: str) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        function = JSON(RESUME(CONFIG(setting_options(name)(function))))
        return commands.command(name, cls=RunCommand)(function)

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


@_run_command("compare")
def compare(config_file: str | None, resume: str | None, as_json: bool, **options: Any) -> None:
    """Train methods side by side, with the same images, recipe and seeds; rank them.

    Each method trains as often as --seeds says, as many at a time as there is room for. The table
    has mean and standard deviation on the test split, the p-value against the best of the others'
    methods, and what a training step costs in time and memory.
    """
    _execute("compare", config_file, resume, as_json, options, _show_comparison)


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


@commands.command("evaluate", cls=RunCommand)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--split",
    type=click.Choice(("train", "val", "test")),
    default="test",
    show_default=True,
    help="which of the images",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False),
    metavar="FOLDER",
    help="write pictures there: scores by class, reliability, confusion matrices",
)
@JSON
@CONFIG
@setting_options("evaluate")
def evaluate(
    models: tuple[str, ...],
    split: str,
    out: str | None,
    config_file: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Score and measure models on images, side by side.

    MODEL is a model.pt that raygkd wrote, the folder of its run, models:/NAME@ALIAS, or an .onnx
    file that 'raygkd export' wrote. The images are those that the first of them was trained on,
    unless --dataset, --data-dir or --config says others; splits are those of a run with the same
    data and --seed. What comes out is also recorded in MLflow, beside the run that a model is of.
    """
    config, _ = resolve("evaluate", config_file, options, None)
    own_data = not (config_file or options["dataset"] or options["data_dir"])
    with only_results_on_stdout() as stdout:
        from raygkd import workflows
        from raygkd.report.console import console_of, stderr_console
        from raygkd.report.tables import evaluation_tables

        result = workflows.evaluate(
            config, models, split, own_data=own_data, out=out, console=stderr_console()
        )
        if as_json:
            stdout.write(json.dumps(result) + "\n")
            return
        console = console_of(stdout)
        for table in evaluation_tables(result):
            console.print(table)
        for path in result["pictures"]:
            console.print(f"picture  {path}", soft_wrap=True)
        for one in filter(None, (one["mlflow"] for one in result["models"].values())):
            console.print(f"MLflow   run {one['run_id']} in {one['tracking_uri']}", soft_wrap=True)


@commands.command("report")
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
        from raygkd import workflows
        from raygkd.report.console import WarningsToConsole, console_of, stderr_console

        logging.getLogger("raygkd").handlers = [WarningsToConsole()]
        result = workflows.write_report(output, html, console=stderr_console())
        if as_json:
            out.write(json.dumps(result) + "\n")
            return
        console = console_of(out)
        for line in result["left_out"]:
            console.print(f"left out  {line}", soft_wrap=True)
        folder = result["html"].rpartition("/")[0]
        console.print(f"pictures  {len(result['pictures'])} PNG files in {folder}", soft_wrap=True)
        console.print(f"page      {result['html']}", soft_wrap=True)


def _show_search(out: Any, result: dict[str, Any]) -> None:
    from raygkd.report.tables import (
        missing_scores,
        models_table,
        repeat_table,
        teacher_note,
        trials_table,
    )

    best, alone, teacher = result["best"], result["student_alone"], result["teacher"]
    rows = [
        ("teacher", teacher["model"], teacher["parameters"], teacher["test_score"]),
        ("student alone", alone["model"], alone["parameters"], alone["test_score"]),
        ("best student", best["model"], best["parameters"], best["test_score"]),
    ]
    out.print(trials_table(result["trials"]))
    out.print(models_table(rows))
    if note := teacher_note(teacher["test_score"], alone["test_score"]):
        out.print(note, soft_wrap=True)
    if result["repeat"] is not None:
        out.print(repeat_table(best["model"], result["repeat"]))
        for line in missing_scores(result["repeat"]):
            out.print(line, soft_wrap=True)
    out.print(f"curves      {result['run']}/search.png", soft_wrap=True)
    _show_registered(out, result)
    _show_next(out, result)


def _show_comparison(out: Any, result: dict[str, Any]) -> None:
    from raygkd.report.tables import (
        comparison_note,
        comparison_table,
        models_table,
        teacher_note,
    )

    comparison, models = result["comparison"], result["models"]
    out.print(comparison_table(comparison))
    out.print(comparison_note(comparison), soft_wrap=True)
    rows = [
        (role, model["model"], model["parameters"], model["test_score"])
        for role, model in models.items()
    ]
    if rows:
        out.print(models_table(rows))
    means = {one["method"]: one["mean"] for one in comparison["methods"]}
    if "teacher" in models and (
        note := teacher_note(models["teacher"]["test_score"], means.get("none"))
    ):
        out.print(note, soft_wrap=True)
    out.print(f"picture     {result['run']}/comparison.png", soft_wrap=True)
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


def _show_registered(out: Any, result: dict[str, Any]) -> None:
    """Tell which version the best student is, and how it takes the place of the one in use."""
    registered = result["best"]["registered"]
    if registered is None:
        return
    name, alias = registered["name"], registered["alias"]
    out.print(
        f"registered  models:/{name}@{alias}, version {registered['version']}", soft_wrap=True
    )
    if alias == "challenger":
        uri = result["mlflow"]["tracking_uri"]
        local = uri.startswith("sqlite")
        store = f"--output {Path(result['run']).parents[1]}" if local else f"--tracking-uri {uri}"
        out.print(f"promote     raygkd promote {name} {store}", soft_wrap=True)


def _show_next(out: Any, result: dict[str, Any]) -> None:
    run = result["run"]
    out.print(f"model file  {run}/model.pt", soft_wrap=True)
    out.print(f"all of it   {run}/result.json", soft_wrap=True)
    uri = result["mlflow"]["tracking_uri"]
    if uri.startswith("sqlite"):
        out.print(f"compare     raygkd ui --output {Path(run).parent.parent}", soft_wrap=True)
    else:
        out.print(f"compare     {uri}", soft_wrap=True)


@commands.group(cls=Commands)
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
    type=ListType(str),
    default="2007,2012",
    show_default=True,
    help="voc: whose trainval images are for training",
)
@click.option("--classes", type=ListType(str), help="boxes of these classes only [default: all]")
@click.option("--strict", is_flag=True, help="refuse faulty annotations instead of dropping them")
@click.option("--output", required=True, help="new folder for the shards (s3:// and gs:// work)")
@click.option("--skip-bad", is_flag=True, help="leave out unreadable images, counted")
@JSON
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
    with only_results_on_stdout() as out:
        from raygkd.config import DATASET_DEFAULTS
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
        usual = DATASET_DEFAULTS.get(dataset, {})
        models = [f" --{role} {usual[role]}" for role in ("teacher", "student") if role in usual]
        out.write(f"next: raygkd tune --dataset parquet --data-dir {output}{''.join(models)}\n")


@data.command("info")
@click.argument("path")
@click.option("--sheet", default="sheet.png", show_default=True, help="PNG of sample images")
@JSON
def data_info(path: str, sheet: str, as_json: bool) -> None:
    """Show counts, classes and sizes of shards; write a sample sheet.

    PATH is a .parquet file or a folder of shards (s3:// and gs:// work).
    """
    with only_results_on_stdout() as out:
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
@click.option("--quick", is_flag=True, help="smaller sizes and fewer rounds")
@JSON
def bench(quick: bool, as_json: bool) -> None:
    """Measure speed and memory side by side with the plain way.

    The losses, a training step, Ray Train, Ray Data and a search, each with what it is to reach
    and whether it does. Ray is started for it, nothing is left behind. Let nothing else run.
    """
    with only_results_on_stdout() as out:
        from raygkd.bench.rows import report
        from raygkd.bench.suites import measured, whole_rows

        out.write(report(measured(whole_rows, quick=quick), as_json=as_json) + "\n")


@commands.command()
@click.option("--output", default="raygkd-output", show_default=True, help="output folder of runs")
@click.option(
    "--tracking-uri",
    help="MLflow server or store [default: MLFLOW_TRACKING_URI, or the store in --output]",
)
@click.option(
    "--address", help="of a running Ray cluster [default: RAY_ADDRESS, or start one here]"
)
@JSON
def doctor(output: str, tracking_uri: str | None, address: str | None, as_json: bool) -> int:
    """Check the installation, and say what to fix.

    Versions, torch, GPUs, disks, shared memory, ports, the MLflow store and Ray, which is started
    for it. The exit code is 1 where something must be fixed. Nothing is left behind.
    """
    with only_results_on_stdout() as out:
        from raygkd.doctor import examine
        from raygkd.report.console import console_of, progress, stderr_console
        from raygkd.report.tables import doctor_table

        with progress(stderr_console(), "checking") as advance:
            result = examine(
                output=output, tracking_uri=tracking_uri, address=address, advance=advance
            )
        if as_json:
            out.write(json.dumps(result) + "\n")
        else:
            console_of(out).print(doctor_table(result["checks"]))
    return 0 if result["ok"] else 1


@commands.command()
@click.option("--output", default="raygkd-output", show_default=True, help="output folder of runs")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="address to serve on, 0.0.0.0 for all of this machine's",
)
@click.option(
    "--port", default=5000, show_default=True, type=click.IntRange(1, 65535), help="TCP port"
)
def ui(output: str, host: str, port: int) -> None:
    """Open the MLflow UI over an output folder; Ctrl-C ends it.

    With another --host it is a server for a team, made where there is none yet. It asks for the
    user and the password in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, and is refused
    without them. Plain HTTP shows the password to the network: use a private one, or put TLS in
    front.
    """
    from raygkd.ui import serve

    if is_remote(output):
        raise ConfigError(
            f"--output {output}: holds no MLflow store, since that is a file: open the server that "
            "the runs were given as --tracking-uri"
        )
    serve(Path(output), host, port)
