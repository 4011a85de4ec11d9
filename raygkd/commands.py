"""The commands as Python functions: ``raygkd.tune``, ``raygkd.compare`` and ``raygkd.train``.

Shapes: B batch, H height, W width, K classes.

They take the settings of the command line by name, and return the finished run. All that is done is
what the command does: the same checks, folders, MLflow runs and cluster.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from raygkd import config as configuration
from raygkd.cli.options import SET, SETTINGS_LEFT_OUT, resolve
from raygkd.cli.run_commands import workflow
from raygkd.config import OutputConfig
from raygkd.errors import ConfigError, near
from raygkd.storage.atomic_files import make_folder, place, write_text
from raygkd.workflows.resume import INPUTS

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]
    from torch import nn

# a search space: a setting -> its choices, {kind: values} as in a file, or a domain of Ray Tune
Space = Mapping[str, Any]
# Tune's sampler of a domain -> the name of our distribution
_SAMPLERS = {"_Uniform": "uniform", "_LogUniform": "loguniform"}


class Run:
    """A finished run.

    Args:
        folder: of the run.

    Attributes:
        folder: of the run.
        result: what the command prints with ``--json``.
    """

    def __init__(self, folder: str):
        from raygkd.workflows.finished_run import open_finished

        self._run = open_finished(folder, option="run")
        self.folder, self.result = str(self._run.folder), dict(self._run.result)

    def __repr__(self) -> str:
        """Return the folder, and how distillation has ended."""
        verdict = self.result.get("verdict")
        told = f", {verdict['line']}" if verdict else ""
        return f"<raygkd run {self.folder}{told}>"

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """Section -> setting -> value, of the model that the run is about."""
        return configuration.to_mapping(self._run.settings)

    @property
    def run_id(self) -> str | None:
        """Id of the MLflow run; None if MLflow failed."""
        tracked = self.result["mlflow"]
        return tracked.get("parent_run_id", tracked.get("run_id"))

    @property
    def trials(self) -> pandas.DataFrame:
        """A row for each trial of a search or training of a comparison, best first.

        The columns are "number", the settings, "epochs", "val_score" after the last of them, and
        "status".
        """
        import pandas

        return pandas.DataFrame(
            {
                "number": trial.number,
                **{name: str(v) if isinstance(v, list) else v for name, v in trial.params.items()},
                "epochs": trial.epoch,
                "val_score": trial.scores.get(trial.epoch),
                "status": trial.status,
            }
            for trial in self._run.trials
        )

    def model(self) -> nn.Module:
        """Return the run's ``model.pt`` in evaluation mode: the champion of a search.

        A classifier takes images (B, 3, H, W) in 0..1, which it normalises, and returns logits
        (B, K); for a detector see ``raygkd.deploy.modules``.
        """
        from raygkd.deploy.modules import student
        from raygkd.models import load_model_file
        from raygkd.workflows.resume import MODEL

        return student(load_model_file(self._run.folder / MODEL))

    def report(self) -> str:
        """Write the report page; return its path."""
        from raygkd.report.console import stderr_console
        from raygkd.workflows.report import write_report

        return str(write_report(self.folder, None, console=stderr_console())["html"])


def tune(*, space: Space | str | None = None, resume: str | None = None, **settings: Any) -> Run:
    """Search the method's settings, as ``raygkd tune`` does.

    >>> import raygkd
    >>> run = raygkd.tune(dataset="digits", trials=4, space={"lr": [0.02, 0.05]})  # doctest: +SKIP
    >>> run.result["verdict"]["line"], run.trials, run.model()  # doctest: +SKIP

    Args:
        space: what is searched: a setting -> a list of choices, {"loguniform": [0.01, 0.1]} as in a
            file of ``--space``, or a domain such as ``ray.tune.loguniform(0.01, 0.1)``; or the path
            of a file. None for the default space.
        resume: as ``--resume``.
        settings: those of the command, such as ``teacher="resnet20"``. A teacher or student may be
            a function of the number of classes to a module; it must stand at the top of a file.
            Settings of a method, ``dkd.beta``, are given as ``**{"dkd.beta": 8}``.

    Raises:
        UserError: a setting, file or model that is missing or wrong.
        RunFailed: the run ended without a result.
    """
    output = os.fspath(settings.get("output", OutputConfig.output))
    return _run("tune", {"space": _space_file(space, output), **settings}, resume)


def compare(*, resume: str | None = None, **settings: Any) -> Run:
    """Train and rank methods, as ``raygkd compare`` does; see ``tune`` for the arguments."""
    return _run("compare", settings, resume)


def train(*, resume: str | None = None, **settings: Any) -> Run:
    """Distil one student, as ``raygkd train`` does; see ``tune`` for the arguments."""
    return _run("train", settings, resume)


def _run(command: str, settings: Mapping[str, Any], resume: str | None) -> Run:
    from raygkd.report.console import stderr_console

    config, folder = resolve(command, None, _options(command, settings), resume)
    result = workflow(command)(config, console=stderr_console(), resume=folder)
    return Run(result["run"])


def _options(command: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as the options of a command.

    Raises:
        ConfigError: settings that the command does not have, one line each.
    """
    known = configuration.option_settings().keys() - SETTINGS_LEFT_OUT[command]
    unknown = [name for name in settings if name not in known and "." not in name]
    if unknown:
        raise ConfigError(
            "\n".join(
                f"raygkd.{command}: no setting {name!r}{near(name, sorted(known))} (see 'raygkd "
                f"{command} --help')"
                for name in unknown
            )
        )
    plain = {name: _plain(name, value) for name, value in settings.items() if "." not in name}
    dotted = [f"{name}={value}" for name, value in settings.items() if "." in name]
    return {**plain, SET: dotted}


def _plain(name: str, value: Any) -> Any:
    """Return a setting's value as the command line has it."""
    if name in ("teacher", "student") and not isinstance(value, str | os.PathLike):
        return _function_name(name, value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _function_name(role: str, function: Any) -> str:
    """Return FILE.py:FUNCTION of a function, which every worker can import."""
    if not inspect.isfunction(function):
        raise ConfigError(
            f"{role}: is a {type(function).__name__}, which other processes cannot build: give a "
            "function of the number of classes to it, a model's name, or a model.pt"
        )
    try:
        source = Path(inspect.getfile(function))
    except (OSError, TypeError):
        source = Path()
    if not source.is_file() or "." in function.__qualname__ or function.__name__ == "<lambda>":
        raise ConfigError(
            f"{role}: the function {function.__qualname__} must stand at the top of a file, since "
            "other processes import it: move it into a .py file"
        )
    return f"{source}:{function.__name__}"


def _space_file(space: Space | str | None, output: str) -> str | None:
    """Return the path of a search space's file, which stays among the inputs of the output folder.

    Args:
        space: as in ``tune``.
        output: the output folder.
    """
    if space is None or isinstance(space, str | os.PathLike):
        return None if space is None else os.fspath(space)
    entries = {name: _entry(name, domain) for name, domain in space.items()}
    text = yaml.safe_dump(entries, sort_keys=False)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = place(output) / INPUTS / f"{digest}-space.yaml"
    make_folder(path.parent)
    write_text(path, text)
    return str(path)


def _entry(name: str, domain: Any) -> Any:
    """Return the entry of a space file for a setting's domain."""
    if isinstance(domain, Mapping):
        return dict(domain)
    if isinstance(domain, list | tuple):
        return {"choice": list(domain)}
    if hasattr(domain, "categories"):
        return {"choice": list(domain.categories)}
    kind = _kind(domain)
    if kind is None:
        raise ConfigError(
            f"space: {name}: {domain!r} is not known: give a list of choices, a mapping such as "
            "{'loguniform': [0.01, 0.1]}, or tune.choice, uniform, loguniform or randint"
        )
    return {kind: [domain.lower, domain.upper]}


def _kind(domain: Any) -> str | None:
    """Return the name of the distribution of a Tune domain of numbers, or None."""
    get: Callable[[], Any] | None = getattr(domain, "get_sampler", None)
    if get is None:
        return None
    kind = _SAMPLERS.get(type(get()).__name__)
    is_whole = type(domain).__name__ == "Integer"
    return {"uniform": "randint"}.get(kind or "") if is_whole else kind
