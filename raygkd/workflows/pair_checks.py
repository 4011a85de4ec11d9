"""Check that teacher, student and images are compatible, before anything starts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from rich.console import Console
from torch import nn

from raygkd.assembly.compatibility import check_kind, check_settings, loads_weights
from raygkd.assembly.derived_configs import teacher_alone, teacher_training
from raygkd.assembly.given_teacher import (
    check_teacher_classes,
    given_teacher,
    named_teacher,
    selection_told,
)
from raygkd.assembly.matched_levels import matched_levels
from raygkd.assembly.methods import (
    distils,
    matches_graphs,
    scores_teacher,
    share_of_epoch,
    student_spec,
    suits,
)
from raygkd.assembly.models import (
    is_model_file,
    new_model,
    outputs_of,
    start_from_teacher,
    start_from_weights,
)
from raygkd.assembly.student_objective import build_graph_loss, build_objective
from raygkd.assembly.text_teachers import check_texts, with_text_teacher
from raygkd.assembly.unlabelled_runs import check_share, check_without_labels
from raygkd.config import Config
from raygkd.data.plan import Mix, steps_per_epoch
from raygkd.data.run_images import Images, task_of
from raygkd.data.spec import ImageSpec
from raygkd.errors import ConfigError, ImageSizeError, UserError
from raygkd.models import (
    LoadedWeights,
    build_from_file,
    build_model,
    check_model_name,
    check_weights,
    count_parameters,
    errors_told,
    family_of,
    feature_shapes,
    is_detector,
    is_function,
    load_model_file,
    short_name,
    starts_trained,
)
from raygkd.models.heads import check_gives_logits, last_linear
from raygkd.report.tables import levels_table

# what is printed of a teacher that --teacher names
MODES = {
    "as-is": (
        "the teacher is used as it is: its weights have as many classes as the images; the names "
        "are unknown, so make sure that the order is the same, or pass --teacher-classes"
    ),
    "probe": "the teacher's last layer is trained on features of its frozen backbone",
    "finetune": "the teacher is fine-tuned first",
    "features": "only the teacher's feature maps are used, not its logits",
    "train": "the teacher is trained first",
}
# pixels; any size serves to check a model's name
NAME_CHECK_SIZE = (64, 64)


def check_names(config: Config, role: str = "student") -> None:
    """Check models and settings as far as possible without the images.

    Args:
        config: what to train.
        role: of the run; "teacher" if only a teacher is trained.

    Raises:
        ConfigError: an unknown model, or models and settings that do not suit the data set's task.
        DataError: missing or damaged files of the teacher or weights, or weights of another model.
    """
    task = task_of(config.data.dataset)
    check_without_labels(config, role)
    if task is not None:
        check_settings(config, task)
        check_methods(config, task)
    name = config.model.teacher
    if is_model_file(name):
        with naming_option("--teacher"):
            file = load_model_file(name)
        if config.model.teacher_weights is not None:
            raise ConfigError(f"--teacher-weights: the teacher {name} is already trained; omit it")
        if task is not None:
            with naming_option(f"--teacher {name}"):
                check_kind(file.name, task)
    elif role == "student":
        _check_model(teacher_alone(config), task, "teacher", trains=False)
    if role == "student":
        check_teacher_classes(config)
        check_texts(config)
    _check_trains(config.model.student, role)
    _check_model(config, task, role)


def check_students(students: Sequence[str]) -> None:
    """Check the names of students without the images.

    Raises:
        ConfigError: an unknown one.
    """
    for student in students:
        with naming_option("--students"):
            check_model_name(student, trains=True)


def check_methods(config: Config, task: str) -> None:
    """Check that all --methods are for the task of the images; lists all that are not."""
    problems = [
        f"--methods {method}: does not support {task}, the task of these images"
        for method in config.compare.methods or ()
        if not suits(method, task)
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _check_trains(name: str, role: str) -> None:
    """Refuse a model to train that can only teach."""
    family = family_of(name)
    if family is not None and family.only_teaches:
        raise ConfigError(
            f"--{role} {short_name(name)}: classifies images by texts and cannot be trained; use "
            "it as --teacher of 'raygkd train', 'tune' or 'compare'"
        )


def _check_model(config: Config, task: str | None, role: str, *, trains: bool = True) -> None:
    """Check the model to train and its weights; errors name the options of the role."""
    name = config.model.student
    with naming_option(f"--{role}"):
        check_model_name(name, trains=trains)
        if task is not None:
            check_kind(name, task)
    with naming_option(f"--{role}-weights"):
        if is_detector(name):
            start_from_weights(config, build_model(name, 2, NAME_CHECK_SIZE), 2)
        elif not loads_weights(name):
            check_weights(name, config.model.student_weights)


@contextlib.contextmanager
def naming_option(option: str) -> Iterator[None]:
    """Prefix errors with the option whose value caused them, unless they begin with another."""
    try:
        yield
    except UserError as error:
        if str(error).startswith("--"):
            raise
        raise type(error)(f"{option}: {error}") from error


def check_student(
    config: Config, images: Images, role: str = "student", *, option: str | None = None
) -> None:
    """Check that the student can train on the images.

    Args:
        config: what to train.
        images: the training data.
        role: "student", or "teacher" if only a teacher is trained.
        option: that errors name; None for that of the role.

    Raises:
        ConfigError: fewer images than a batch, images too small for the student, or another task.
    """
    spec = images.spec.of_teacher() if role == "teacher" else images.spec
    check_settings(config, spec.task)
    check_share(config, spec)
    _check_steps(config, images)
    with naming_option(option or f"--{role}"):
        with _naming_size(config.model.student, spec, role):
            student = new_model(config.model.student, spec)
            feature_shapes(student, (), spec.image_size)
        if not any(parameter.requires_grad for parameter in student.parameters()):
            raise ConfigError(
                f"{short_name(config.model.student)} has no parameters that can be trained; choose "
                "another model"
            )


def _check_steps(config: Config, images: Images) -> None:
    """Check that there are training images for a batch of every worker."""
    workers, labelled = config.cluster.workers.most, images.rows["train"]
    batch_size = config.optim.batch_size // workers
    share = share_of_epoch(config, images.spec)
    if not share:
        steps_per_epoch(len(labelled), workers, batch_size)
        return
    mix = Mix(
        labelled=labelled,
        unlabelled=images.rows["unlabelled"],
        share=share,
        num_rows=len(images.table),
    )
    mix.steps_per_epoch(workers, batch_size)
    held_out = len(images.rows["val"])
    if held_out < workers:
        raise ConfigError(
            f"--workers {workers}: {held_out} images are held out for validation, fewer than "
            "workers: lower --workers or raise --val-fraction"
        )


@contextlib.contextmanager
def _naming_size(name: str, spec: ImageSpec, role: str) -> Iterator[None]:
    """Name the option of the size of images in errors about it, and tell a function's errors."""
    with errors_told(name) if is_function(name) else contextlib.nullcontext():
        try:
            yield
        except ImageSizeError as error:
            has_own = role == "teacher" and spec.task == "classification"
            option = "--teacher-image-size" if has_own else "--image-size"
            raise ConfigError(f"{error} (choose another {option})") from error


def teacher_model(config: Config, spec: ImageSpec) -> nn.Module:
    """Return the teacher of a run: the given one, or a model of its name with random weights.

    Raises:
        ConfigError: it has other classes, the images are too small for it, or it cannot be trained
            with these settings.
        DataError: its weights do not fit the model it names.
    """
    name = with_text_teacher(config).model.teacher
    if not is_model_file(name) and _must_train(config):
        teacher_training(config)
    is_file, of_teacher = is_model_file(name), spec.of_teacher()
    with (
        naming_option(f"--teacher {name}" if is_file else "--teacher"),
        _naming_size(name, of_teacher, "teacher"),
    ):
        if is_file:
            teacher = build_from_file(given_teacher(config, spec))
        else:
            teacher = new_model(name, of_teacher)
        feature_shapes(teacher, (), of_teacher.image_size)
    return teacher


def _must_train(config: Config) -> bool:
    """Return whether it is clear before its weights are loaded that a teacher is trained."""
    name, mode = config.model.teacher, config.model.teacher_mode
    is_random = not is_detector(name) and not starts_trained(name, config.model.teacher_weights)
    return is_detector(name) or mode == "train" or (mode == "auto" and is_random)


def starting_weights(
    config: Config,
    spec: ImageSpec,
    console: Console,
    *,
    with_teacher: bool,
    trained: str = "student",
) -> dict[str, LoadedWeights]:
    """Load the weights that student and teacher start from, and print what they are.

    Args:
        config: of the run.
        spec: of the images.
        console: for what was loaded.
        with_teacher: whether the run has one.
        trained: what the person calls the model that is trained: "student" or "teacher".

    Returns:
        "student" and "teacher" -> what was loaded, of classifiers that do not start at random.

    Raises:
        ConfigError: weights that a model does not have, or a teacher that cannot be trained with
            these settings.
        DataError: weights that cannot be had or do not fit.
    """
    with naming_option(f"--{trained}-weights"):
        own = student_spec(config, spec)
        student = new_model(config.model.student, own)
        found = {"student": start_from_weights(config, student, outputs_of(own))}
    if with_teacher:
        found["teacher"] = teacher_weights(config, spec, console)
    known = {role: weights for role, weights in found.items() if weights is not None}
    for role, weights in known.items():
        shown = trained if role == "student" else role
        console.print(f"{shown} weights: {weights}", soft_wrap=True)
    return known


def teacher_weights(config: Config, spec: ImageSpec, console: Console) -> LoadedWeights | None:
    """Load the weights that the teacher starts from, and print how it is used.

    Args:
        config: of the run.
        spec: of the images.
        console: for what is printed.

    Returns:
        What was loaded; None for a model file, random weights, and detectors.

    Raises:
        UserError: see ``starting_weights``.
    """
    if is_model_file(config.model.teacher):
        if not scores_teacher(config):
            console.print(MODES["features"])
        names = load_model_file(config.model.teacher).class_names
        if names != spec.class_names and scores_teacher(config):
            console.print(f"teacher: {selection_told(names, spec.class_names)}")
        return None
    with naming_option("--teacher-weights"):
        teacher = named_teacher(config, spec.of_teacher())
    if teacher.mode in ("train", "finetune"):
        teacher_training(config)
    elif teacher.mode == "probe":
        _, layer = last_linear(teacher.model, len(spec.class_names))
        check_gives_logits(layer, teacher.model, spec.of_teacher().image_size)
    told = MODES[teacher.mode]
    if teacher.texts is not None:
        count = len(teacher.texts.prompts)
        told = (
            f"the teacher is used as it is: it classifies by {count} "
            f"text{'s' if count > 1 else ''} for each class, such as "
            f"'{teacher.texts.prompts[0].replace('{}', teacher.texts.class_names[0])}'"
        )
    elif teacher.class_names:
        told = selection_told(teacher.class_names, spec.class_names)
        told = f"the teacher is used as it is: {told}"
    console.print(told, soft_wrap=True)
    if teacher.notice:
        console.print(f"the teacher is not used as it is: {teacher.notice}", soft_wrap=True)
    return teacher.weights


def show_pair(config: Config, spec: ImageSpec, teacher: nn.Module, console: Console) -> None:
    """Print the modules that the student inherits from the teacher, and the matched levels.

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
            pairs = matched_levels(config, teacher, student, spec).pairs
        with naming_option("--dim"):
            graph = build_graph_loss(config, teacher, student, spec)
    elif distils(config):
        with naming_option(f"--method {method}"):
            objective = build_objective(config, spec, teacher)
        if objective.levels:
            pairs = matched_levels(config, teacher, student, spec).pairs
            levels = ", ".join(f"{level}:{other}" for level, other in pairs.items())
            console.print(f"{method} compares the maps of levels {levels} (student:teacher)")
    if copied:
        parameters = sum(count_parameters(student.get_submodule(path)) for path in copied)
        console.print(
            f"the student starts from the teacher's neck and heads: {parameters:,} of its "
            f"{count_parameters(student):,} parameters"
        )
    if graph is not None:
        console.print(levels_table(graph.describe(), pairs))
