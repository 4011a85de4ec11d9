"""Command line options, generated from the settings, and the configuration they give."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import click

from raygkd import config as configuration
from raygkd.config import Config, DataConfig
from raygkd.errors import ConfigError, near
from raygkd.storage.atomic_files import Place
from raygkd.workflows.resume import named_run_folder, own_config, run_folder


def _of(*sections: str) -> set[str]:
    """Return the names of the settings of some sections."""
    known = configuration.option_settings()
    return {name for name, (section, _, _) in known.items() if section in sections}


# settings that are not options of a command; all others are options of every command
SETTINGS_LEFT_OUT = {
    # distillation settings do not apply to the teacher; --method is ignored, but accepted by every
    # command that trains one model
    "teacher": _of("train", "search", "compare")
    | (_of("method") - {"method"})
    | {"inherit", "student_weights", "teacher_epochs", "teacher_mode"}
    | {"teacher_classes", "class_names", "prompts", "unlabelled", "unlabelled_share", "recipe"},
    "train": _of("search", "compare"),
    "tune": _of("train", "compare") - {"methods"},
    # each method uses its own published weight
    "compare": (_of("train", "search") - {"max_concurrent"}) | {"method", "baseline_weight"},
    "evaluate": (
        _of("model", "method", "train", "search", "compare", "optim", "recipe", "cluster", "output")
        - {"batch_size", "seed", "gpus_per_worker", "address", "output", "tracking_uri"}
    )
    | {"image_size", "teacher_image_size", "augment", "unlabelled", "unlabelled_share"},
}

# command and setting -> its default, where that is not the setting's own
DEFAULTS = {("evaluate", "dataset"): "that of the first model's run"}

# the parameter of --set, and the commands that take it for the settings of some sections only
SET = "set_values"
SET_SECTIONS = {"teacher": ("data",), "evaluate": ("data",), "prepare": ("data",)}


def set_sections(command: str) -> Collection[str]:
    """Return the sections whose registered settings a command takes with ``--set``."""
    return SET_SECTIONS.get(command, tuple(configuration.REGISTRIES))


class Commands(click.Group):
    """A group that suggests similar commands for a misspelled one, and shows help for none."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Show help if there are no arguments."""
        return super().parse_args(ctx, args or ["--help"])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Return the command; suggest similar ones if there is none of this name."""
        if args and self.get_command(ctx, args[0]) is None:
            known = self.list_commands(ctx)
            raise click.UsageError(
                f"no command {args[0]!r}{near(args[0], known)} (commands: {', '.join(known)})"
            )
        return super().resolve_command(ctx, args)


class RunCommand(click.Command):
    """A command whose help lists the settings by section, as in a YAML file."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a list for each section."""
        known = configuration.option_settings()
        # an option of the command's own may have the name of a setting
        own = SETTINGS_LEFT_OUT.get(self.name or "", set())
        groups: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            is_setting = param.name in known and param.name not in own
            section = known[param.name][0] if is_setting else "Options"
            if record is not None and isinstance(param, click.Option):
                groups.setdefault(section.capitalize(), []).append(record)
        taken = set_sections(self.name or "")
        for name, (section, leaf, kind) in configuration.registered_settings().items():
            if section in taken:
                record = (f"{name}={_kind_name(kind, leaf)}", _setting_help(leaf))
                groups[section.capitalize()].append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


class Option(click.Option):
    """An option whose help text is built when it is shown.

    Args:
        declarations: names, as in ``click.Option``.
        look_up: returns the help text.
        attributes: other arguments of ``click.Option``.
    """

    def __init__(self, declarations: Sequence[str], look_up: Callable[[], str], **attributes: Any):
        self._look_up = look_up
        super().__init__(declarations, **attributes)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the option's entry in the help."""
        self.help = self._look_up()
        return super().get_help_record(ctx)


class ListType(click.ParamType):
    """Values of one type, separated by commas.

    Args:
        kind: int, float or str.
    """

    name = "A,B,..."

    def __init__(self, kind: type):
        self._kind = kind

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return the values as a tuple."""
        try:
            return tuple(self._kind(part) for part in value.split(","))
        except ValueError:
            whole = "whole numbers" if self._kind is int else "numbers"
            self.fail(f"{value!r} must be {whole} separated by commas", param, ctx)


class FiniteRange(click.FloatRange):
    """A finite number in a range; ``FloatRange`` takes NaN and infinity as well."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return the number."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


class Share(FiniteRange):
    """A number from 0 to 1."""

    def __init__(self) -> None:
        super().__init__(0.0, 1.0)


class _Workers(click.ParamType):
    """A number of workers, or a range A-B."""

    name = "N|A-B"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        return configuration.coerce("workers", configuration.WorkerRange, value)


class _Levels(click.ParamType):
    """Levels, or pairs of levels, separated by commas."""

    name = "N|N:M,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        return configuration.coerce("levels", tuple[configuration.LevelPair], value.split(","))


class Choice(click.Choice):
    """A choice whose values are looked up when needed, since other packages can add some.

    Args:
        look_up: returns the allowed values.
    """

    def __init__(self, look_up: Callable[[], Sequence[str]]):
        self._look_up = look_up
        super().__init__(())

    @property
    def choices(self) -> Any:
        """The allowed values."""
        return tuple(self._look_up())

    @choices.setter
    def choices(self, value: Any) -> None:
        """Ignore the value that click sets initially."""


def _option_type(kind: Any, leaf: Any) -> Any:
    base = configuration.base_type(kind)
    if base == tuple[configuration.LevelPair, ...]:
        return _Levels()
    if typing.get_origin(base) is tuple:
        return ListType(typing.get_args(base)[0])
    if base is configuration.WorkerRange:
        return _Workers()
    if leaf.metadata["choices"]:
        return Choice(functools.partial(configuration.allowed_choices, leaf))
    return base


def setting_options(command: str) -> Callable[[Any], Any]:
    """Return a decorator that adds an option for every setting a command uses."""

    def decorate(function: Any) -> Any:
        if set_sections(command):
            function = set_option(command)(function)
        for name, (_, leaf, kind) in reversed(configuration.option_settings().items()):
            if name in SETTINGS_LEFT_OUT[command]:
                continue
            text = functools.partial(_setting_help, leaf, DEFAULTS.get((command, name)))
            if configuration.base_type(kind) is bool:
                flags = f"{configuration.flag(name)}/--no-{name.replace('_', '-')}"
                option = click.option(flags, name, cls=Option, default=None, look_up=text)
            else:
                option = click.option(
                    configuration.flag(name),
                    name,
                    cls=Option,
                    type=_option_type(kind, leaf),
                    default=None,
                    look_up=text,
                )
            function = option(function)
        return function

    return decorate


def _setting_help(leaf: Any, default: str | None = None) -> str:
    """Return the help text of a setting, with the given default, or its own.

    Its own default is left out if it is None or False, or if the text states one.
    """
    text = leaf.metadata["help"]
    text = text() if callable(text) else text
    if default is not None:
        return f"{text} [default: {default}]"
    if leaf.default is None or leaf.default is False or "[default" in text:
        return text
    return f"{text} [default: {configuration.text_of(leaf.default)}]"


def _kind_name(kind: Any, leaf: Any) -> str:
    """Return the placeholder for a setting's value in the help."""
    if configuration.base_type(kind) is bool:
        return "true|false"
    choices = configuration.allowed_choices(leaf)
    if choices:
        return "|".join(choices)
    known = {int: "INTEGER", float: "FLOAT", str: "TEXT"}
    return known.get(configuration.base_type(kind), ListType.name)


def set_option(command: str) -> Callable[[Any], Any]:
    """Return the decorator that adds ``--set`` to a command."""
    return click.option(
        "--set",
        SET,
        metavar="NAME=VALUE",
        multiple=True,
        help="set a dotted setting (listed below), such as "
        f"{_set_example(command)}; can be repeated",
    )


def _set_example(command: str) -> str:
    return "csv.label=COLUMN" if set_sections(command) == ("data",) else "dkd.beta=8"


CONFIG = click.option(
    "--config", "config_file", metavar="FILE", help="YAML file of settings; options override it"
)
RESUME = click.option(
    "--resume",
    metavar="FOLDER",
    help="resume the run in this folder, or the newest interrupted run in this output folder",
)
JSON = click.option("--json", "as_json", is_flag=True, help="print the result as JSON on stdout")


def resolve(
    command: str,
    config_file: str | None,
    options: Mapping[str, Any],
    resume: str | None,
    *,
    has_data: bool = True,
) -> tuple[Config, Place | None]:
    """Return the configuration of a command, and the folder of the run it resumes.

    ``--config`` overrides the defaults, and options override ``--config``. A run is resumed with
    its own configuration, with ``--resume`` or if a run of this ``--name`` exists; settings given
    in addition must equal those of the run. ``has_data`` is False where the folder of the data set
    is that of another machine.

    Raises:
        ConfigError: unreadable files, unknown keys, invalid values.
    """
    known = configuration.option_settings()
    tree = _config_tree(config_file) if config_file is not None else {}
    plain = {name: value for name, value in options.items() if name != SET and value is not None}
    named = read_set_options(command, options.get(SET, ()), plain)
    for section, name, value in [*((known[n][0], n, v) for n, v in plain.items()), *named]:
        tree.setdefault(section, {})[name] = value
    start = tree.get("train", {})
    if has_data and command == "train" and {"start_from", "quantize"} & start.keys():
        tree = _with_settings_of_run(tree)
    data = tree.get("data", {})
    if data.get("unlabelled") is not None and not {"dataset", "data_dir"} & data.keys():
        # without labelled images beside them they are the data set
        alone = {"dataset": "unlabelled", "data_dir": data["unlabelled"], "unlabelled": None}
        tree["data"] = data = {**data, **alone}
    if has_data and "data_dir" in data:
        tree["data"] = {**data, "dataset": recognise_data_set(data)}
    if resume is not None:
        folder = run_folder(resume, command)
    else:
        config = configuration.from_mapping(tree, where=config_file or "options")
        begun = named_run_folder(config, command)
        if begun is None:
            return config, None
        folder = begun
    asked = {name: value for leaves in tree.values() for name, value in leaves.items()}
    return own_config(folder, asked), folder


def _with_settings_of_run(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with those of the run that ``--start-from`` names, where none are given."""
    # needs torch, which help does without
    from raygkd.workflows.start_from import settings_of_run

    given = settings_of_run(tree)
    return {name: {**given.get(name, {}), **tree.get(name, {})} for name in {**given, **tree}}


def recognise_data_set(settings: Mapping[str, Any], *, allow_unlabelled: bool = False) -> str:
    """Return the data set: the one chosen or, if it is auto or only a folder is given, the
    folder's, which is reported on standard error.

    A folder of images alone is refused, unless images without labels are allowed.
    """
    folder = settings.get("data_dir")
    dataset = settings.get("dataset", "auto" if folder else DataConfig.dataset)
    if dataset != "auto":
        return dataset
    from raygkd.data.recognition import recognise

    found, seen = recognise(folder, allow_unlabelled=allow_unlabelled)
    click.echo(f"data set: {found} ({seen} in {folder})", err=True)
    return found


def read_set_options(
    command: str, texts: Iterable[str], options: Mapping[str, Any]
) -> list[tuple[str, str, Any]]:
    """Return section, name and value of each ``--set NAME=VALUE``."""
    known = configuration.settings()
    taken = set_sections(command)
    allowed = [name for name, (section, _, _) in known.items() if "." in name and section in taken]
    found = []
    for text in texts:
        given, equals, value = text.partition("=")
        name = configuration.OTHER_NAMES.get(given, given)
        if not equals and name in allowed:
            raise ConfigError(f"--set {text!r}: has no value; write {given}=VALUE")
        if not equals or (name not in allowed and given == name):
            raise ConfigError(
                f"--set {text!r}: must be NAME=VALUE, such as {_set_example(command)}"
                f"{near(given, allowed)} (--help lists the names)"
            )
        if name in options:
            raise ConfigError(
                f"--set {given} and {configuration.flag(name)} are the same setting; use only one "
                "of them"
            )
        section, _, kind = known[name]
        found.append((section, name, configuration.coerce_text(name, kind, value)))
    return found


def _config_tree(config_file: str) -> dict[str, Any]:
    """Return the settings of a YAML file, by section."""
    tree = configuration.read_yaml(config_file, option="--config")
    configuration.check_keys(tree, where=config_file)
    return configuration.plain_names(tree)


@contextlib.contextmanager
def only_results_on_stdout() -> Iterator[Any]:
    """Redirect standard output to standard error; yield the real standard output."""
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)
    try:
        encoding = sys.stdout.encoding
        with os.fdopen(os.dup(real), "w", encoding=encoding, errors="backslashreplace") as out:
            yield out
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os.dup2(real, 1)
        os.close(real)
