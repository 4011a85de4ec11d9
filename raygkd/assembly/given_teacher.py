"""A teacher that comes with weights: whether it is trained first, or used as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from raygkd.assembly.compatibility import check_kind, check_teacher
from raygkd.assembly.derived_configs import teacher_alone
from raygkd.assembly.methods import scores_teacher
from raygkd.assembly.models import (
    is_model_file,
    new_model,
    outputs_of,
    start_from_weights,
    student_file,
)
from raygkd.assembly.text_teachers import Texts, add_texts, with_text_teacher
from raygkd.config import Config
from raygkd.data.spec import ImageSpec
from raygkd.errors import ConfigError
from raygkd.models import (
    Detector,
    LoadedWeights,
    ModelFile,
    build_from_file,
    class_places,
    is_detector,
    known_class_names,
    load_model_file,
    read_class_names,
    short_name,
    starts_trained,
    with_classes,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class NamedTeacher:
    """A teacher that ``--teacher`` names, before any training.

    Attributes:
        model: with the weights that it starts from.
        weights: what was loaded; None for random weights, and for detectors.
        mode: "as-is", "probe", "finetune", "train" or "features"; never "auto".
        class_names: of its weights, where the classes of the images were selected by name.
        notice: why the names were not used, where they are known; else "".
        texts: that stand for the classes, of an image-text model; None for others.
    """

    model: nn.Module
    weights: LoadedWeights | None
    mode: str
    class_names: tuple[str, ...] = ()
    notice: str = ""
    texts: Texts | None = None


def named_teacher(config: Config, spec: ImageSpec) -> NamedTeacher:
    """Return the teacher of a run whose ``--teacher`` is a name.

    Where the names of its weights' classes are known, those of the images are selected by name.

    Raises:
        ConfigError: an unknown name, one that is to be used as it is and is not trained, or class
            names that are not those of the weights or of the images.
        DataError: its weights or the class names cannot be had or do not fit.
    """
    config = with_text_teacher(config)
    check_teacher_classes(config)
    names = _class_names(config)
    problem = ""
    if names:
        try:
            places = class_places(names, spec.class_names, _names_source(config))
        except ConfigError as error:
            if config.model.teacher_classes is not None:
                raise
            problem = str(error)
        else:
            selected = _selected(config, spec, names, places)
            if selected is not None:
                return selected
    model, weights = _started(config, spec)
    texts = add_texts(config, spec, model)
    mode = _chosen_mode(config, model, weights, len(spec.class_names), problem)
    notice = problem if mode == "probe" and weights is not None and weights.is_whole else ""
    return NamedTeacher(model=model, weights=weights, mode=mode, notice=notice, texts=texts)


def check_teacher_classes(config: Config) -> None:
    """Refuse ``--teacher-classes`` of a teacher that it does not apply to.

    Raises:
        ConfigError: says why.
        DataError: the file cannot be read.
    """
    model, path = config.model, config.model.teacher_classes
    if path is None:
        return
    name = short_name(model.teacher)
    reason = None
    if is_model_file(model.teacher):
        reason = f"{name} has class names of its own"
    elif is_detector(model.teacher):
        reason = f"{name} is a detector"
    elif model.teacher_mode not in ("auto", "as-is"):
        reason = f"--teacher-mode {model.teacher_mode} does not use the last layer of its weights"
    elif not starts_trained(model.teacher, model.teacher_weights):
        reason = f"the weights of {name} are random"
    if reason is not None:
        raise ConfigError(f"--teacher-classes {path}: {reason}; omit it")
    read_class_names(path)


def _names_source(config: Config) -> str:
    """Return what errors call the class names of a teacher."""
    given = config.model.teacher_classes
    return f"--teacher-classes {given}" if given is not None else short_name(config.model.teacher)


def _class_names(config: Config) -> tuple[str, ...]:
    """Return the class names of a named teacher's weights; () where they are not used."""
    model = config.model
    if model.teacher_classes is not None:
        return read_class_names(model.teacher_classes)
    if model.teacher_mode not in ("auto", "as-is") or is_detector(model.teacher):
        return ()
    return known_class_names(model.teacher, model.teacher_weights)


def weights_class_names(config: Config) -> tuple[str, ...]:
    """Return the classes of the teacher's logits as it was trained; () where they are not known."""
    if is_model_file(config.model.teacher):
        return load_model_file(config.model.teacher).class_names
    return _class_names(config)


def _selected(
    config: Config, spec: ImageSpec, names: tuple[str, ...], places: Sequence[int]
) -> NamedTeacher | None:
    """Return the teacher with the classes at some places among those of its weights.

    None where the weights have another number of classes than there are names, and nobody said that
    the names are theirs.
    """
    own = dataclasses.replace(spec, class_names=names)
    model, weights = _started(config, own)
    if weights is None or not weights.is_whole:
        if config.model.teacher_classes is None:
            return None
        raise ConfigError(
            f"--teacher-classes: has {len(names)} names, but the weights of "
            f"{short_name(config.model.teacher)} have a different number of classes; list their "
            "names"
        )
    if names != spec.class_names:
        whole = student_file(teacher_alone(config), own, model.state_dict(), {}, weights)
        model = build_from_file(with_classes(whole, places, spec.class_names))
    return NamedTeacher(model=model, weights=weights, mode="as-is", class_names=names)


def _started(config: Config, spec: ImageSpec) -> tuple[nn.Module, LoadedWeights | None]:
    """Return the teacher's model with the weights that it starts from, and what was loaded."""
    alone = teacher_alone(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.optim.seed)
        model = new_model(alone.model.student, spec)
        return model, start_from_weights(alone, model, outputs_of(spec))


def given_teacher(config: Config, spec: ImageSpec) -> ModelFile:
    """Return the teacher of a run whose ``--teacher`` is a model file.

    A classifier's logits are selected by name, unless only its feature maps are used.

    Raises:
        ConfigError: it is for another task, or lacks a class of the images.
        DataError: the file cannot be read.
    """
    path = config.model.teacher
    file = load_model_file(path)
    check_kind(file.name, spec.task)
    if not scores_teacher(config):
        return file
    if file.class_names == spec.class_names or is_detector(file.name):
        check_teacher(file, spec)
        return file
    try:
        places = class_places(file.class_names, spec.class_names, path)
    except ConfigError:
        # says it of all classes
        check_teacher(file, spec)
        raise
    return with_classes(file, places, spec.class_names)


def selection_told(names: Sequence[str], wanted: Sequence[str]) -> str:
    """Return how the classes of the images were selected among those of a teacher's weights."""
    if tuple(names) == tuple(wanted):
        return "its classes are those of the images, by name"
    if len(names) == len(wanted):
        return f"its {len(names)} classes are reordered to match those of the images, by name"
    return f"the images' {len(wanted)} classes are selected from its {len(names):,} by name"


def _chosen_mode(
    config: Config,
    model: nn.Module,
    weights: LoadedWeights | None,
    num_classes: int,
    problem: str,
) -> str:
    """Return ``--teacher-mode``, with "auto" resolved.

    Args:
        config: of the run.
        model: the teacher.
        weights: that were loaded; None for random ones.
        num_classes: of the images.
        problem: why the weights' classes are not those of the images; "" where that is not known.

    Raises:
        ConfigError: weights that the mode cannot do with.
    """
    mode = config.model.teacher_mode
    if mode == "auto":
        if weights is None:
            return "train"
        return "as-is" if weights.is_whole and not problem else "probe"
    allowed = "train" if weights is None else "features, probe, finetune or train"
    name = short_name(config.model.teacher)
    if isinstance(model, Detector) and mode != "train":
        raise ConfigError(f"--teacher-mode {mode}: {name} is a detector (allowed: auto, train)")
    if weights is None and mode != "train":
        raise ConfigError(
            f"--teacher-mode {mode}: the weights of {name} are random; pass --teacher-weights, or "
            f"--teacher-mode {allowed}"
        )
    if mode == "as-is" and weights is not None and not weights.is_whole:
        raise ConfigError(
            f"--teacher-mode as-is: {', '.join(weights.new_layers)} of {name} starts at random for "
            f"the {num_classes} classes of these images: pass --teacher-weights of a model with "
            f"these classes, or --teacher-mode {allowed}"
        )
    if mode == "as-is" and problem:
        raise ConfigError(
            f"--teacher-mode as-is: {problem}; pass --teacher-classes, or --teacher-mode {allowed}"
        )
    return mode


def untrained_teacher_file(config: Config, spec: ImageSpec, teacher: NamedTeacher) -> ModelFile:
    """Return the model file of a teacher with the weights that it starts from."""
    state = teacher.model.state_dict()
    config = with_text_teacher(config)
    return student_file(teacher_alone(config), spec, state, {}, teacher.weights)
