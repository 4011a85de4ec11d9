"""The MLflow server of an output folder: local, or for other machines with a password."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from raygkd.errors import ConfigError, ResourceError, RunFailed
from raygkd.storage.temporary import temporary_folder
from raygkd.tracking.moved_store import move_places_along

HOST = "127.0.0.1"
USER, PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
# MLflow's rules for passwords; the second is what its examples had
_SHORTEST, _REFUSED = 12, "password1234"
# the half of MLflow that a page opens in
_TRAINING = "workflowType=machine_learning"
# seconds that the server has to end requests that are under way
_GRACE = 5.0


def serve(output: Path, host: str, port: int) -> None:
    """Run the MLflow server of an output folder until Ctrl-C or SIGTERM.

    Beyond loopback it requires the user and password from the environment, creates a missing folder
    and store, and stores the artifacts of its clients.

    Args:
        output: folder that holds mlflow.db.
        host: name or address to listen on.
        port: TCP port.

    Raises:
        ConfigError: the folder has no store (loopback), or there is no user, no password or one
            that MLflow rejects (other hosts).
        ResourceError: the host is not this machine, the port is in use, or the folder cannot be
            created.
        TrackingError: the store cannot be created.
        RunFailed: the server exited unexpectedly.
    """
    store = output / "mlflow.db"
    shared = not is_loopback(host)
    _check_host(host)
    if shared:
        _check_password(host)
    elif not store.is_file():
        raise ConfigError(
            f"--output {output}: contains no mlflow.db; pass the --output of an earlier run, or "
            "start one: raygkd tune --dataset digits --trials 8"
        )
    check_port(host, port)
    if shared:
        _make_store(store)
    move_places_along(store)
    told = _signals()
    _announce(store, host, port, shared)
    with temporary_folder("ui") as private:
        environment = _environment(host, port)
        if shared:
            environment |= _authentication(private)
        _run(_command(store, host, port, shared), environment, told)


def is_loopback(host: str) -> bool:
    """Return whether a host is a loopback address, which no other machine can reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_password(host: str) -> None:
    password = os.environ.get(PASSWORD, "")
    if not os.environ.get(USER) or not password:
        raise ConfigError(
            f"--host {host}: serves other machines as well, which requires a password; set {USER} "
            f"and {PASSWORD}, or omit --host to serve only this machine"
        )
    if len(password) < _SHORTEST or password == _REFUSED:
        raise ConfigError(
            f"{PASSWORD}: must have at least {_SHORTEST} characters, and must not be MLflow's old "
            "default; choose another"
        )


def _make_store(store: Path) -> None:
    # takes seconds to import
    from raygkd.tracking.store import SERVED, make_store

    try:
        store.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"--output {store.parent}: cannot be created ({error.strerror}); choose another folder"
        ) from error
    make_store(store, SERVED)


def _announce(store: Path, host: str, port: int, shared: bool) -> None:
    # takes seconds to import
    from raygkd.tracking.store import experiments

    everywhere = host in ("0.0.0.0", "::")
    url = _url(socket.gethostname() if everywhere else host, port)
    # MLflow's first page is one on language models
    pages = [
        f"runs of {name}: {url}/#/experiments/{number}/runs?{_TRAINING}"
        for number, name in experiments(store).items()
    ]
    pages = pages or ["runs will appear under 'Model training' (top left), 'Experiments'"]
    told = "\n".join([f"MLflow UI on {url} (Ctrl-C stops it)", *pages])
    print(told, file=sys.stderr, flush=True)
    if shared:
        print(
            f"to log runs there, pass --tracking-uri {url} and set {USER} and {PASSWORD} as here",
            file=sys.stderr,
            flush=True,
        )


def _signals() -> list[int]:
    """Install handlers of the signals that stop the server; return the list they append to."""
    # an exception out of a handler could come between the server's start and its name here
    told: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: told.append(number))
    return told


def _run(command: list[str], environment: dict[str, str], told: list[int]) -> None:
    # MLflow's command starts processes of its own and passes signals on to them; in a group apart
    # from the terminal's they get Ctrl-C once, from here, and none is left over
    server = subprocess.Popen(command, env=environment, process_group=0)
    while server.poll() is None and not told:
        time.sleep(0.1)
    if told:
        _signal_group(server, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(_GRACE)
    _signal_group(server, signal.SIGKILL)
    code = server.wait()
    if not told:
        raise RunFailed(f"MLflow's server ended with exit code {code}; its output is above")


def _command(store: Path, host: str, port: int, shared: bool) -> list[str]:
    uri, artifacts = f"sqlite:///{store}", (store.parent / "mlartifacts").as_uri()
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port)]
    command += ["--backend-store-uri", uri, "--registry-store-uri", uri, "--workers", "1"]
    if shared:
        # a folder of this machine is of no use to others: they send their artifacts to the server
        command += ["--app-name", "basic-auth", "--artifacts-destination", artifacts]
    else:
        command += ["--default-artifact-root", artifacts]
    # a line for each request is of no use here
    return [*command, "--uvicorn-opts", "--log-level warning"]


def _environment(host: str, port: int) -> dict[str, str]:
    names = _names(host)
    hosts = [_in_url(name) for name in names]
    # a bracket begins a class of characters where there is a star
    hosts += [name.replace("[", "[[]") + ":*" for name in hosts]
    return {
        # Requests under any other name are refused, with a password as well: a page whose name is
        # bound to this machine later on (DNS rebinding) asks under its own. The interface is a
        # page of these names, and posts as one. Who serves under more names sets both.
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(hosts),
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": ",".join(_url(name, port) for name in names),
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        **os.environ,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # eight more processes, for scoring of language models
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        # deprecations between MLflow and its web framework
        "PYTHONWARNINGS": "ignore",
    }


def _authentication(private: Path) -> dict[str, str]:
    """Return the environment of MLflow's basic authentication for the one user, an admin.

    Args:
        private: folder that nobody else can read. The user database is created anew at each start,
            so that a changed password takes effect.
    """
    settings = private / "basic_auth.ini"
    settings.write_text(
        "[mlflow]\n"
        "default_permission = NO_PERMISSIONS\n"
        f"database_uri = sqlite:///{private / 'users.db'}\n"
        # a password is compared once an hour, and not in 0.2 s of each request
        "auth_cache_ttl_seconds = 3600\n"
    )
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(settings),
        "MLFLOW_AUTH_ADMIN_USERNAME": os.environ[USER],
        "MLFLOW_AUTH_ADMIN_PASSWORD": os.environ[PASSWORD],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(),
    }


def _names(host: str) -> list[str]:
    """Return the names and addresses under which clients can reach the server."""
    names = {host, "localhost", "127.0.0.1", "::1"}
    if not is_loopback(host):
        names |= {socket.gethostname(), socket.getfqdn()}
        for interface in psutil.net_if_addrs().values():
            families = (socket.AF_INET, socket.AF_INET6)
            names |= {place.address for place in interface if place.family in families}
    return sorted(names)


def _in_url(host: str) -> str:
    return f"[{host.partition('%')[0]}]" if ":" in host else host.lower()


def _url(host: str, port: int) -> str:
    return f"http://{_in_url(host)}" + (f":{port}" if port != 80 else "")


def _signal_group(leader: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader.pid, number)


def check_port(host: str, port: int) -> None:
    """Refuse a host that is not this machine, and a port that is in use.

    Raises:
        ResourceError: with the option and what to do.
    """
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ResourceError(_not_here(host, "unknown name")) from error
    with socket.socket(places[0][0], socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(places[0][4])
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise ResourceError(_not_here(host, str(error.strerror))) from error
            raise ResourceError(
                f"--port {port}: cannot be used on {host} ({error.strerror}); choose another, such "
                f"as --port {port + 1}"
            ) from error


def _check_host(host: str) -> None:
    try:
        socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ResourceError(_not_here(host, "unknown name")) from error


def _not_here(host: str, reason: str) -> str:
    return (
        f"--host {host}: is not an address of this machine ({reason}); choose one, or 0.0.0.0 for "
        "all interfaces"
    )
