"""The commands as Python functions: ``raygkd.tune``, ``raygkd.compare`` and ``raygkd.train``.

Shapes: B batch, H height, W width, K classes.

They take the settings of the command line by name, and return the finished run. Checks, folders,
MLflow runs and cluster are those of the command.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
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

    from raygkd.data.images import Images

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
        """Return the folder and the verdict."""
        verdict = self.result.get("verdict")
        told = f", {verdict['line']}" if verdict else ""
        return f"<raygkd run {self.folder}{told}>"

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """Section -> setting -> value, for the run's model."""
        return configuration.to_mapping(self._run.settings)

    @property
    def run_id(self) -> str | None:
        """Id of the MLflow run; None if MLflow failed."""
        tracked = self.result["mlflow"]
        return tracked.get("parent_run_id", tracked.get("run_id"))

    @property
    def trials(self) -> pandas.DataFrame:
        """A row for each trial of a search, or each training of a comparison; best first.

        The columns are "number", the settings, "epochs", "val_score" after the last epoch, and
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

    @property
    def students(self) -> pandas.DataFrame:
        """A row for the best trial of each student that a search chose from, best first.

        The columns are "number", "student", "image_size" (None if it was not searched),
        "val_score", the costs, "front" (whether no other student beats it in all aims), and for
        those in the front "model", the path of the model file, and "model_uri", its version in
        MLflow. There are no rows if no costs were measured.
        """
        import pandas

        found = []
        for row in self.result.get("students") or []:
            own = {name: one for name, one in row.items() if name not in ("costs", "registered")}
            version = row.get("registered") or {}
            found.append({**own, **row["costs"], "model_uri": _model_uri(version)})
        return pandas.DataFrame(found)

    @property
    def front(self) -> pandas.DataFrame:
        """The rows of ``students`` that no other student beats in all aims."""
        students = self.students
        return students[students["front"]] if len(students) else students

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


def _model_uri(version: Mapping[str, Any]) -> str | None:
    """Return models:/NAME/VERSION of a registered version."""
    return f"models:/{version['name']}/{version['version']}" if version else None


def tune(
    *,
    data: Images | None = None,
    space: Space | str | None = None,
    resume: str | None = None,
    **settings: Any,
) -> Run:
    """Search the method's settings, as ``raygkd tune`` does.

    Examples:
        >>> import raygkd
        >>> run = raygkd.tune(dataset="digits", space={"lr": [0.02, 0.05]})  # doctest: +SKIP
        >>> run.result["verdict"]["line"], run.trials, run.model()  # doctest: +SKIP

    Args:
        data: images as torch or Ray data sets; None for those of ``dataset`` and ``data_dir``.
            They are written once, to the folder "inputs" in the output folder.
        space: the search space, or the path of a ``--space`` file; None for the default space. It
            maps a setting to a list of choices, to an entry of a file such as
            {"loguniform": [0.01, 0.1]}, or to a domain such as
            ``ray.tune.loguniform(0.01, 0.1)``.
        resume: as ``--resume``.
        settings: settings of the command, such as ``teacher="resnet20"``. Teacher and student may
            be functions that take the number of classes and return a module; they must be defined
            at the top level of a .py file. Pass settings of a method, such as ``dkd.beta``, as
            ``**{"dkd.beta": 8}``.

    Raises:
        UserError: a setting, file or model is missing or wrong.
        RunFailed: the run ended without a result.
    """
    return _run("tune", {"space": _space_file(space, _output(settings)), **settings}, resume, data)


def compare(*, data: Images | None = None, resume: str | None = None, **settings: Any) -> Run:
    """Train and rank methods, as ``raygkd compare`` does; see ``tune`` for the arguments."""
    return _run("compare", settings, resume, data)


def train(*, data: Images | None = None, resume: str | None = None, **settings: Any) -> Run:
    """Distil one student, as ``raygkd train`` does; see ``tune`` for the arguments."""
    return _run("train", settings, resume, data)


def _run(command: str, settings: Mapping[str, Any], resume: str | None, data: Images | None) -> Run:
    from raygkd.report.console import stderr_console
    from raygkd.workflows.early_checks import check_early

    options = _options(command, {**settings, **_open_session(settings)})
    parent = None if data is None else _inputs(data, settings)
    if parent is not None:
        options |= {"dataset": "parquet", "data_dir": str(parent)}
    config, folder = resolve(command, None, options, resume)
    if folder is None:
        check_early(command, config)
    if data is not None and parent is not None:
        # settings are checked before the images are written
        options["data_dir"] = _written(data, parent)
        config, folder = resolve(command, None, options, resume)
    result = workflow(command)(config, console=stderr_console(), resume=folder)
    return Run(result["run"])


def _output(settings: Mapping[str, Any]) -> str:
    return os.fspath(settings.get("output", OutputConfig.output))


def _open_session(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the address of the Ray session that is open in this process, unless one is given."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized() or settings.get("address"):
        return {}
    return {"address": ray.get_runtime_context().gcs_address}


def _inputs(data: Images, settings: Mapping[str, Any]) -> Path:
    """Return the folder that the folder of the images is written to.

    Raises:
        ConfigError: the images are of another type, or another setting excludes them.
    """
    from raygkd.data.images import Images

    if not isinstance(data, Images):
        raise ConfigError(
            f"data: is a {type(data).__name__}; pass raygkd.Images(train=..., val=..., test=...), "
            "or name a folder by data_dir"
        )
    given = [name for name in ("dataset", "data_dir") if settings.get(name) is not None]
    if given:
        raise ConfigError(f"data: {given[0]} names other images; omit one of the two")
    output = place(_output(settings))
    if not isinstance(output, Path):
        raise ConfigError(
            f"data: the output {output} is in an object store; write the images with 'raygkd data "
            "prepare' first, and pass data_dir"
        )
    return output / INPUTS


def _written(data: Images, parent: Path) -> str:
    """Return the folder of the images, which is written if it is new."""
    from raygkd.data.images import write_images
    from raygkd.report.console import progress, stderr_console

    with progress(stderr_console(), "writing images") as advance:
        return str(write_images(data, parent, advance))


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
            f"{role}: is a {type(function).__name__}, which other processes cannot build; pass a "
            "function that takes the number of classes and returns a module, the name of a model, "
            "or a model.pt"
        )
    try:
        source = Path(inspect.getfile(function))
    except (OSError, TypeError):
        source = Path()
    if not source.is_file() or "." in function.__qualname__ or function.__name__ == "<lambda>":
        raise ConfigError(
            f"{role}: the function {function.__qualname__} must be defined at the top level of a "
            ".py file, because other processes import it; move it there"
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
            f"space: {name}: {domain!r} is not supported; use a list of choices, a mapping such as "
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
