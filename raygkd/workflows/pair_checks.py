"""Whether teacher, student and images go together, before anything starts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from torch import nn

from raygkd.assembly.compatibility import check_kind, check_settings, check_teacher
from raygkd.assembly.derived_configs import teacher_alone, teacher_training
from raygkd.assembly.matched_levels import chosen_levels
from raygkd.assembly.methods import distils, matches_graphs
from raygkd.assembly.models import is_model_file, new_model, start_from_teacher, start_from_weights
from raygkd.assembly.student_objective import build_graph_loss, build_objective
from raygkd.config import Config
from raygkd.data.plan import steps_per_epoch
from raygkd.data.run_images import Images, task_of
from raygkd.data.spec import ImageSpec
from raygkd.errors import ConfigError, UserError
from raygkd.models import (
    build_from_file,
    build_model,
    count_parameters,
    feature_shapes,
    load_model_file,
)
from raygkd.report.tables import levels_table

# pixels; any size will do to see whether there is a model of a name
NAME_CHECK_SIZE = (64, 64)


def check_names(config: Config, role: str = "student") -> None:
    """Refuse what can be told to be wrong without the images, before anything starts.

    Args:
        config: what to train.
        role: "student", or "teacher" where one is trained alone.

    Raises:
        ConfigError: an unknown model, or models and settings that are not for the data set's task.
        DataError: a teacher's file or weights that are missing or damaged, or weights of another
            model.
    """
    task = task_of(config.data.dataset)
    if task is not None:
        check_settings(config, task)
    name = config.model.teacher
    if is_model_file(name):
        with naming_option("--teacher"):
            file = load_model_file(name)
        if config.model.teacher_weights is not None:
            raise ConfigError(
                f"--teacher-weights: the teacher {name} is already trained: leave it out"
            )
        if task is not None:
            with naming_option(f"--teacher {name}"):
                check_kind(file.name, task)
    elif role == "student":
        _check_model(teacher_alone(config), task, "teacher")
    _check_model(config, task, role)


def _check_model(config: Config, task: str | None, role: str) -> None:
    """Refuse the model that is trained, or its weights; the options are named after the role."""
    name = config.model.student
    with naming_option(f"--{role}"):
        model = build_model(name, 2, NAME_CHECK_SIZE)
        if task is not None:
            check_kind(name, task)
    with naming_option(f"--{role}-weights"):
        start_from_weights(config, model)


@contextlib.contextmanager
def naming_option(option: str) -> Iterator[None]:
    """Put an option before what is wrong with its value."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{option}: {error}") from error


def check_student(config: Config, images: Images, role: str = "student") -> None:
    """Refuse images that the student cannot train on.

    Args:
        config: what to train.
        images: what to train on.
        role: "student", or "teacher" where one is trained alone.

    Raises:
        ConfigError: they are fewer than a batch, too small for the student, or of another task.
    """
    check_settings(config, images.spec.task)
    workers = config.cluster.workers.most
    steps_per_epoch(len(images.rows["train"]), workers, config.optim.batch_size // workers)
    with naming_option(f"--{role}"):
        student = new_model(config.model.student, images.spec)
        feature_shapes(student, (), images.spec.image_size)


def teacher_model(config: Config, spec: ImageSpec) -> nn.Module:
    """Return the teacher of a run as far as it is known: the given one, or an untrained one.

    Raises:
        ConfigError: it tells other classes apart, the images are too small for it, or it cannot be
            trained with these settings.
        DataError: its weights are not those of the model it names.
    """
    name = config.model.teacher
    if not is_model_file(name):
        wanted = teacher_training(config)
        with naming_option("--teacher"):
            teacher = new_model(wanted.model.student, spec)
    else:
        file = load_model_file(name)
        with naming_option(f"--teacher {name}"):
            check_teacher(file, spec)
            teacher = build_from_file(file)
    with naming_option("--teacher"):
        feature_shapes(teacher, (), spec.image_size)
    return teacher


def show_pair(config: Config, spec: ImageSpec, teacher: nn.Module, console: Console) -> None:
    """Print what the student starts with of the teacher, and the levels that are matched.

    Raises:
        ConfigError: unknown levels, a spectral dimension too large for one, or nothing to inherit.
    """
    student = new_model(config.model.student, spec)
    with naming_option("--inherit"):
        copied = start_from_teacher(config, student, teacher)
    graph = None
    method = config.method.method
    if matches_graphs(method):
        with naming_option("--levels"):
            chosen_levels(config, teacher, student)
        with naming_option("--dim"):
            graph = build_graph_loss(config, teacher, student, spec.image_size)
    elif distils(config):
        with naming_option(f"--method {method}"):
            objective = build_objective(config, spec, teacher)
        if objective.levels:
            levels = ", ".join(map(str, objective.levels))
            console.print(f"{method} compares the maps of level {levels}")
    if copied:
        parameters = sum(count_parameters(student.get_submodule(path)) for path in copied)
        console.print(
            f"the student starts from the teacher's neck and heads: {parameters:,} of its "
            f"{count_parameters(student):,} parameters"
        )
    if graph is not None:
        console.print(levels_table(graph.describe()))
