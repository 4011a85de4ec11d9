"""This machine and its MLflow store: ``raygkd bench``, ``doctor`` and ``ui``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from raygkd.cli.options import JSON, only_results_on_stdout
from raygkd.errors import ConfigError
from raygkd.storage.atomic_files import is_remote


@click.command()
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


@click.command()
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
        from raygkd.report.console import console_of, progress, stderr_console
        from raygkd.report.tables import doctor_table
        from raygkd.workflows.doctor import examine

        with progress(stderr_console(), "checking") as advance:
            result = examine(
                output=output, tracking_uri=tracking_uri, address=address, advance=advance
            )
        if as_json:
            out.write(json.dumps(result) + "\n")
        else:
            console_of(out).print(doctor_table(result["checks"]))
    return 0 if result["ok"] else 1


@click.command()
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
    from raygkd.tracking.server import serve

    if is_remote(output):
        raise ConfigError(
            f"--output {output}: holds no MLflow store, since that is a file: open the server that "
            "the runs were given as --tracking-uri"
        )
    serve(Path(output), host, port)
