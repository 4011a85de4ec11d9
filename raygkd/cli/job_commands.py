"""Run commands as jobs on a cluster: ``raygkd submit`` and ``raygkd jobs``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import click

from raygkd import config as configuration
from raygkd.cli.options import (
    JSON,
    SET,
    SETTINGS_LEFT_OUT,
    Commands,
    only_results_on_stdout,
    resolve,
)
from raygkd.errors import ConfigError
from raygkd.storage.temporary import temporary_folder

# settings whose values may be local files, which are uploaded with a job
_FILES = (
    *("config_file", "space", "teacher", "student"),
    *("weights", "teacher_weights", "student_weights", "teacher_classes"),
    *("class_names", "prompts"),
)
_ADDRESS = click.option(
    "--address",
    metavar="URL",
    help=(
        "URL of the cluster's dashboard [default: RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265]"
    ),
)


@click.command(context_settings={"allow_interspersed_args": False})
@_ADDRESS
@click.option("--no-wait", is_flag=True, help="print the job's id and return at once")
@click.argument("command", type=click.Choice(sorted(SETTINGS_LEFT_OUT)))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def submit(address: str | None, no_wait: bool, command: str, arguments: tuple[str, ...]) -> int:
    """Run a command as a job on a Ray cluster: raygkd submit -- tune --dataset voc ...

    Local files named in its options (--config, --space, model files) are uploaded. The data and
    --output must be on storage that all nodes share. The exit code is that of the job.
    """
    known = click.get_current_context().find_root().command
    assert isinstance(known, click.Group)
    options = known.commands[command].make_context(f"raygkd {command}", list(arguments)).params
    _check_job(command, options)
    with only_results_on_stdout() as out:
        from raygkd.rayrun import jobs

        named = [options.get(name) or "" for name in _FILES]
        named += [*(options.get("models") or ()), *(options.get("students") or ())]
        # of FILE.py:FUNCTION the file
        named += [name.rpartition(":")[0] for name in named if ".py:" in name]
        files = [path for path in named if os.path.isfile(path)]
        client = jobs.connect(address)
        with temporary_folder("job") as folder:
            packed = jobs.package(arguments, files, folder)
            job = jobs.submit(client, [command, *packed], folder)
        if no_wait:
            out.write(f"{job}\n")
            return 0
        return _follow(client, job, out)


def _check_job(command: str, options: Mapping[str, Any]) -> None:
    """Raise an error for invalid settings of a job that show without its data."""
    known = {*configuration.option_settings(), SET}
    asked = {name: value for name, value in options.items() if name in known}
    if options.get("resume") is None:
        config, _ = resolve(command, options["config_file"], asked, None, has_data=False)
        places = {
            "--output": config.output.output,
            "--data-dir": config.data.data_dir,
            "--unlabelled": config.data.unlabelled,
        }
    else:
        places = {"--resume": options["resume"]}
    for flag, place in places.items():
        if place and "://" not in place and not os.path.isabs(os.path.expanduser(place)):
            raise ConfigError(
                f"{flag} {place}: a job runs in a temporary folder; pass the absolute path of a "
                "folder that all nodes share"
            )


def _follow(client: Any, job: str, out: Any) -> int:
    """Print the output of a job; return its exit code."""
    from raygkd.rayrun import jobs

    click.echo(f"job {job}", err=True)

    def write(text: str) -> None:
        out.write(text)
        out.flush()

    try:
        return jobs.follow(client, job, write)
    except KeyboardInterrupt:
        click.echo(
            f"the job keeps running; follow it with: raygkd jobs logs {job}, stop it with: "
            f"raygkd jobs stop {job}",
            err=True,
        )
        raise


@click.group("jobs", cls=Commands)
def jobs_group() -> None:
    """List, follow and stop the jobs of a cluster."""


@jobs_group.command("list")
@_ADDRESS
@JSON
def jobs_list(address: str | None, as_json: bool) -> None:
    """List the submitted jobs, latest first."""
    with only_results_on_stdout() as out:
        from raygkd.rayrun import jobs
        from raygkd.report.console import console_of
        from raygkd.report.tables import jobs_table

        rows = [
            {
                "job": job.submission_id,
                "status": job.status.value,
                "command": job.entrypoint,
                "started": job.start_time,
                "ended": job.end_time,
            }
            for job in jobs.jobs(jobs.connect(address))
        ]
        if as_json:
            out.write(json.dumps(rows) + "\n")
        else:
            console_of(out).print(jobs_table(rows))


@jobs_group.command("logs")
@_ADDRESS
@click.argument("job")
def jobs_logs(address: str | None, job: str) -> int:
    """Follow the output of a job until it ends."""
    with only_results_on_stdout() as out:
        from raygkd.rayrun import jobs

        client = jobs.connect(address)
        jobs.known(client, job)
        return _follow(client, job, out)


@jobs_group.command("stop")
@_ADDRESS
@click.argument("job")
def jobs_stop(address: str | None, job: str) -> None:
    """Stop a job; its log says how to resume it."""
    with only_results_on_stdout() as out:
        from raygkd.rayrun import jobs

        client = jobs.connect(address)
        jobs.known(client, job)
        out.write("stopping\n" if client.stop_job(job) else "the job has already ended\n")
