"""Commands for finished models: ``raygkd evaluate``, ``export``, ``predict``, ``promote``."""

from __future__ import annotations

import json
from typing import Any

import click

from raygkd.cli.options import (
    CONFIG,
    JSON,
    Choice,
    FiniteRange,
    Option,
    RunCommand,
    Share,
    only_results_on_stdout,
    resolve,
    setting_options,
)
from raygkd.registry import FORMATS

_OUTPUT = click.option(
    "--output",
    default="raygkd-output",
    show_default=True,
    help="output folder of the runs, to look up models:/NAME",
)
_TRACKING_URI = click.option(
    "--tracking-uri",
    help="MLflow server or store, to look up models:/NAME [default: MLFLOW_TRACKING_URI, "
    "or the store in --output]",
)
_ADDRESS = click.option(
    "--address",
    help="address of a running Ray cluster [default: RAY_ADDRESS, or start a local one]",
)


@click.command("evaluate", cls=RunCommand)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--split",
    type=click.Choice(("train", "val", "test")),
    default="test",
    show_default=True,
    help="split to score",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False),
    metavar="FOLDER",
    help="write pictures to this folder: scores by class, reliability, confusion matrices",
)
@click.option(
    "--weights",
    metavar="FILE",
    help="weights if MODEL is a name: pretrained, or a weights file [default: pretrained]",
)
@JSON
@CONFIG
@setting_options("evaluate")
def evaluate(
    models: tuple[str, ...],
    split: str,
    out: str | None,
    weights: str | None,
    config_file: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Score and measure models on images, side by side.

    MODEL is a model.pt written by raygkd, the folder of its run, models:/NAME@ALIAS, a file
    written by 'raygkd export', or the name of a classifier, with --weights. Images default to those
    that the first model was trained on; --dataset, --data-dir or --config selects others. Splits
    are those of a run with the same data and --seed. Results are also logged to MLflow, next to the
    run of each model.
    """
    config, _ = resolve("evaluate", config_file, options, None)
    own_data = not (config_file or options["dataset"] or options["data_dir"])
    with only_results_on_stdout() as stdout:
        from raygkd.report.console import console_of, stderr_console
        from raygkd.report.tables import evaluation_tables
        from raygkd.workflows.evaluate import evaluate

        result = evaluate(
            config,
            models,
            split,
            own_data=own_data,
            out=out,
            weights=weights,
            console=stderr_console(),
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


def _formats_help() -> str:
    """Return a summary of each format."""
    known = FORMATS.summaries().items()
    return "; ".join(f"{name}: {_as_continued(text)}" for name, text in known)


def _as_continued(sentence: str) -> str:
    """Return a sentence for the middle of a line: names such as NumPy and ONNX stay as they are."""
    first = sentence.split(maxsplit=1)[0]
    return sentence if first[1:] != first[1:].lower() else sentence[0].lower() + sentence[1:]


@click.command()
@click.argument("model", type=click.Path())
@click.option(
    "--format",
    "format",
    cls=Option,
    type=Choice(FORMATS.names),
    required=True,
    look_up=_formats_help,
)
@click.option(
    "--out", type=click.Path(), required=True, help="file to write, with the suffix of the format"
)
@click.option(
    "--quantize",
    type=click.Choice(("int8", "dynamic")),
    help="8 bits, in formats that have it; int8: with ranges from training images; dynamic: "
    "activations quantised at run time, without images",
)
@click.option(
    "--calibration-images",
    type=click.IntRange(min=1),
    help="maximum number of training images for the ranges of --quantize int8 [default: 256]",
)
@click.option(
    "--max-drop",
    type=FiniteRange(min=0.0),
    help="largest fall of the validation score in points (hundredths) with --quantize int8; the "
    "layers with the largest errors stay in float until it is met [default: 0.5]",
)
@click.option(
    "--data",
    type=click.Path(),
    help="Parquet images to compare and calibrate on [default: those the model was trained on]",
)
@click.option(
    "--license",
    "licence",
    default="unknown",
    show_default=True,
    help="licence of the weights for the model card, such as apache-2.0",
)
@_OUTPUT
@_TRACKING_URI
@JSON
def export(
    model: str,
    format: str,
    out: str,
    quantize: str | None,
    calibration_images: int | None,
    max_drop: float | None,
    data: str | None,
    licence: str,
    output: str,
    tracking_uri: str | None,
    as_json: bool,
) -> None:
    """Export a model to another format, and compare the two.

    MODEL is a model.pt written by raygkd, the folder of its run, or models:/NAME@ALIAS. An onnx or
    torch file includes the normalisation: its input is any number of images, with pixels in 0..1.
    """
    with only_results_on_stdout() as out_stream:
        from raygkd.report.console import console_of, stderr_console
        from raygkd.report.export_tables import export_tables, slower_note
        from raygkd.workflows.export import export
        from raygkd.workflows.quantise import quantisation_of

        result = export(
            model,
            format=format,
            out=out,
            quantisation=quantisation_of(quantize, calibration_images, max_drop),
            licence=licence,
            data=data,
            output=output,
            tracking_uri=tracking_uri,
            console=stderr_console(),
        )
        if as_json:
            out_stream.write(json.dumps(result) + "\n")
            return
        console = console_of(out_stream)
        for table in export_tables(result):
            console.print(table)
        if (note := slower_note(result)) is not None:
            console.print(note, soft_wrap=True)


@click.command()
@click.argument("model", type=click.Path())
@click.argument("paths", type=click.Path(), nargs=-1, required=True, metavar="PATH...")
@click.option(
    "--out",
    type=click.Path(),
    help="file to write, .jsonl or .parquet [default: JSON Lines on stdout]",
)
@click.option(
    "--draw",
    type=click.Path(file_okay=False),
    metavar="FOLDER",
    help="write pictures to this folder: boxes on each image, or labelled sheets",
)
@click.option(
    "--top",
    type=click.IntRange(min=1),
    help="maximum number of predictions per image [default: 5 classes, or all detections]",
)
@click.option(
    "--threshold",
    type=Share(),
    default=0.3,
    show_default=True,
    help="minimum score of a detection",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="images per batch in each process",
)
@_ADDRESS
@_OUTPUT
@_TRACKING_URI
def predict(
    model: str,
    paths: tuple[str, ...],
    out: str | None,
    draw: str | None,
    top: int | None,
    threshold: float,
    batch_size: int,
    address: str | None,
    output: str,
    tracking_uri: str | None,
) -> None:
    """Apply a model to images: files, folders, or Parquet with a column "image".

    MODEL is a model.pt written by raygkd, the folder of its run, models:/NAME@ALIAS, or a
    file written by 'raygkd export'. Results are in the order of the images. Unreadable images are
    reported and skipped.
    """
    with only_results_on_stdout() as out_stream:
        from raygkd.report.console import stderr_console
        from raygkd.workflows.model_locator import find_model

        path = find_model(model, tracking_uri=tracking_uri, output=output)
        # imports torch
        from raygkd.workflows.predict import predict_images

        console = stderr_console()
        counts = predict_images(
            path,
            paths,
            out=out,
            draw=draw,
            top=top,
            threshold=threshold,
            batch_size=batch_size,
            address=address,
            console=console,
            stdout=out_stream,
        )
        console.print(f"{counts['images']:,} images, {counts['skipped']:,} skipped")
        for written in filter(None, (out, draw)):
            console.print(f"written to {written}", soft_wrap=True)


@click.command()
@click.argument("name")
@click.option(
    "--margin",
    type=Share(),
    default=0.0,
    show_default=True,
    help="minimum lead of the challenger in test score",
)
@click.option(
    "--data",
    type=click.Path(),
    help="Parquet images, whose test split is scored [default: those of the challenger's run]",
)
@_ADDRESS
@_OUTPUT
@_TRACKING_URI
@JSON
def promote(
    name: str,
    margin: float,
    data: str | None,
    address: str | None,
    output: str,
    tracking_uri: str | None,
    as_json: bool,
) -> None:
    """Make the challenger of a registered model its champion, if it is better.

    NAME is a registered model: its first version starts as the champion, and the winner of the
    latest search is the challenger. Both are scored on the same test images; the alias "champion"
    moves only if the challenger scores higher, by at least --margin. The exit code is 0 either way.
    """
    with only_results_on_stdout() as out:
        from raygkd.report.console import console_of, stderr_console
        from raygkd.report.tables import promotion_note, promotion_table
        from raygkd.workflows.promote import promote

        result = promote(
            name,
            margin=margin,
            data=data,
            address=address,
            output=output,
            tracking_uri=tracking_uri,
            console=stderr_console(),
        )
        if as_json:
            out.write(json.dumps(result) + "\n")
            return
        console = console_of(out)
        console.print(promotion_table(result))
        for line in promotion_note(result):
            console.print(line, soft_wrap=True)
