"""This machine and its MLflow store: ``raygkd bench``, ``doctor`` and ``ui``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from raygkd.cli.options import JSON, only_results_on_stdout
from raygkd.errors import ConfigError
from raygkd.storage.atomic_files import is_remote, place


@click.command()
@click.argument(
    "suite", type=click.Choice(["all", "core", "peers"]), default="all", metavar="[SUITE]"
)
@click.option("--quick", is_flag=True, help="smaller sizes and fewer rounds")
@JSON
def bench(suite: str, quick: bool, as_json: bool) -> None:
    """Measure speed and memory against plain implementations, or against other packages.

    SUITE is "all" by default: the losses, a training step, Ray Train, Ray Data and a search, each
    with its target and whether it is met; Ray is started and stopped again. "core" is the losses
    and the step. "peers" compares a step with that of timm and of torchdistill, and a small job
    with a plain torch script and with Lightning (needs the extra 'peers'). Run nothing else at the
    same time.
    """
    with only_results_on_stdout() as out:
        from raygkd.bench.rows import report
        from raygkd.bench.suites import SUITES, measured

        out.write(report(measured(SUITES[suite], quick=quick), as_json=as_json) + "\n")


@click.command()
@click.option("--output", default="raygkd-output", show_default=True, help="output folder of runs")
@click.option(
    "--tracking-uri",
    help="MLflow server or store [default: MLFLOW_TRACKING_URI, or the store in --output]",
)
@click.option(
    "--address",
    help="address of a running Ray cluster [default: RAY_ADDRESS, or start a local one]",
)
@JSON
def doctor(output: str, tracking_uri: str | None, address: str | None, as_json: bool) -> int:
    """Check the installation, and report what to fix.

    Checks versions, torch, GPUs, disks, shared memory, ports, the MLflow store and Ray, which is
    started and stopped again. The exit code is 1 if something must be fixed.
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
    help="address to listen on; 0.0.0.0 for all interfaces",
)
@click.option(
    "--port", default=5000, show_default=True, type=click.IntRange(1, 65535), help="TCP port"
)
def ui(output: str, host: str, port: int) -> None:
    """Serve the MLflow UI of an output folder; Ctrl-C stops it.

    By default, only this machine can reach it. With any other --host, it is a tracking server for
    a team, and a missing store is created. Clients must then log in with the user name and password
    that MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD hold when the server starts; both are
    required. Plain HTTP exposes the password to the network: use a private one, or put TLS in
    front.
    """
    from raygkd.tracking.server import serve

    if is_remote(output):
        raise ConfigError(
            f"--output {output}: an object store cannot hold the MLflow store; open the server "
            "that the runs used as --tracking-uri"
        )
    try:
        folder = place(output)
    except ConfigError as error:
        raise ConfigError(f"--output {error}") from error
    assert isinstance(folder, Path)
    serve(folder, host, port)
