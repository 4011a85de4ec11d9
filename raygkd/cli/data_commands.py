"""Images as Parquet shards: ``raygkd data``."""

from __future__ import annotations

import json
from typing import Any

import click

from raygkd.cli.options import (
    JSON,
    Commands,
    ListType,
    Option,
    RunCommand,
    only_results_on_stdout,
    read_set_options,
    recognise_data_set,
    set_option,
)
from raygkd.errors import ConfigError, DataError, to_paste
from raygkd.registry import DATASETS, either, entry_name


@click.group(cls=Commands)
def data() -> None:
    """Prepare images as Parquet shards, and inspect them."""


@data.command("prepare", cls=RunCommand)
@click.option(
    "--dataset",
    cls=Option,
    default="auto",
    look_up=lambda: (
        f"data set: {', '.join(DATASETS.names())}, or auto, detected from --data-dir [default: "
        "auto]"
    ),
)
@click.option("--data-dir", type=str, help="folder of the data set")
@click.option(
    "--download",
    cls=Option,
    is_flag=True,
    look_up=lambda: f"download {either(DATASETS.names_with('can_fetch'))} if it is missing",
)
@click.option(
    "--years",
    type=ListType(str),
    default="2007,2012",
    show_default=True,
    help="voc: years whose trainval images are used for training",
)
@click.option(
    "--classes", type=ListType(str), help="keep only boxes of these classes [default: all]"
)
@click.option("--strict", is_flag=True, help="stop at faulty annotations instead of dropping them")
@click.option(
    "--output", required=True, help="new folder for the shards (s3:// and gs:// paths work)"
)
@click.option(
    "--skip-bad", is_flag=True, help="skip and count unreadable images instead of stopping"
)
@set_option("prepare")
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
    set_values: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write a data set as Parquet shards."""
    with only_results_on_stdout() as out:
        from raygkd.config import dataset_defaults, owned_by
        from raygkd.config.validation import check_values
        from raygkd.data.prepare import prepare
        from raygkd.data.sources import open_source
        from raygkd.report.console import progress, stderr_console

        dataset = recognise_data_set(
            {"dataset": dataset, "data_dir": data_dir}, allow_unlabelled=True
        )
        if dataset == "parquet":
            raise ConfigError(
                "--dataset parquet: is already prepared; train on it with --data-dir "
                f"{data_dir or 'PATH'}"
            )
        given = {name: value for _, name, value in read_set_options("prepare", set_values, {})}
        check_values(given)
        source = open_source(
            dataset,
            data_dir,
            download,
            strict=strict,
            years=tuple(map(str, given.get("years", years))),
            classes=classes,
            own=owned_by(entry_name(dataset), given),
        )
        with progress(stderr_console(), "preparing images") as advance:
            summary = prepare(source, output, skip_bad=skip_bad, strict=strict, progress=advance)
        for warning in summary["warnings"]:
            stderr_console().print(f"warning: {warning}", soft_wrap=True)
        if as_json:
            out.write(json.dumps(summary) + "\n")
            return
        splits = ", ".join(f"{name} {count}" for name, count in summary["splits"].items())
        of = f"of {summary['classes']} classes" if summary["classes"] else "without labels"
        out.write(
            f"{summary['images']} images {of} ({splits}) in "
            f"{summary['shards']} shard(s), {summary['bytes']:,} bytes, at {output}\n"
        )
        if summary["bad"]:
            examples = "; ".join(summary["bad_examples"])
            out.write(f"skipped {summary['bad']} unreadable images: {examples}\n")
        usual = dataset_defaults(dataset)
        how = ["--dataset", "parquet", "--data-dir", output]
        for role in ("teacher", "student"):
            how += [f"--{role}", usual[role]] if role in usual else []
        if not summary["classes"]:
            how = ["--unlabelled", output, "--teacher", "NAME", "--student", "NAME"]
        out.write(f"next: {to_paste('tune', *how)}\n")


@data.command("info")
@click.argument("path")
@click.option(
    "--dataset",
    cls=Option,
    default="auto",
    look_up=lambda: f"data set: {', '.join(DATASETS.names())}, or auto [default: auto]",
)
@click.option(
    "--sheet",
    default="sheet.png",
    show_default=True,
    help="PNG file to write, with sample images of shards",
)
@JSON
def data_info(path: str, dataset: str, sheet: str, as_json: bool) -> None:
    """Show counts, classes, image sizes and faults of a data set; of shards, also sample images.

    PATH is a .parquet file, a folder of shards (s3:// and gs:// paths work), or a data set in any
    other supported layout.
    """
    with only_results_on_stdout() as out:
        from raygkd.report.console import console_of
        from raygkd.report.tables import classes_table, info_table

        info = dataset_info(path, dataset, sheet)
        if as_json:
            out.write(json.dumps(info) + "\n")
            return
        console = console_of(out)
        console.print(info_table(info))
        if info["classes"]:
            console.print(classes_table(info["classes"]))
        if "sheet" in info:
            console.print(f"sample sheet: {sheet}", soft_wrap=True)


def dataset_info(path: str, dataset: str = "auto", sheet: str | None = None) -> dict[str, Any]:
    """Return facts on a data set of any layout.

    Args:
        path: of its folder or file.
        dataset: its kind; "auto" to recognise it.
        sheet: file of sample images to write, if the data set is prepared; None for none.
    """
    from raygkd.data.recognition import PARQUET, holds_parquet
    from raygkd.storage.atomic_files import is_remote, local_path

    if not is_remote(path) and not local_path(path).exists():
        raise DataError(f"no file or folder '{path}'; pass a folder of images or a .parquet file")
    if dataset == "auto" and not holds_parquet(path):
        dataset = recognise_data_set({"dataset": dataset, "data_dir": path}, allow_unlabelled=True)
    if dataset not in ("auto", PARQUET):
        from raygkd.data.source_info import source_info
        from raygkd.data.sources import open_source

        return source_info(open_source(dataset, path), path)
    from raygkd.data.inspect import sample_sheet, table_info
    from raygkd.data.parquet import open_table

    table = open_table(path)
    if sheet is not None:
        sample_sheet(table, sheet)
    return table_info(table) | ({} if sheet is None else {"sheet": sheet})
