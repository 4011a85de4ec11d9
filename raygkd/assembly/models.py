"""Untrained models, the weights they start from, and the files of trained ones."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from raygkd.assembly.compatibility import check_kind
from raygkd.assembly.methods import distils, student_spec
from raygkd.config import Config, to_yaml, with_settings
from raygkd.data.spec import ImageSpec
from raygkd.errors import ConfigError
from raygkd.models import (
    NONE,
    TORCHVISION_WEIGHTS,
    Detector,
    LoadedWeights,
    ModelFile,
    build_model,
    classifier_names,
    family_name,
    family_of,
    inherit,
    inheritable,
    is_detector,
    load_classifier,
    load_weights,
    model_input,
    torchvision_file,
)


def new_model(name: str, spec: ImageSpec) -> nn.Module:
    """Return an untrained model for images.

    Raises:
        ConfigError: an unknown name, a model for another task, or images of a single class.
    """
    check_kind(name, spec.task)
    if spec.task == "classification" and len(spec.class_names) == 1:
        raise ConfigError(
            "a classifier needs at least 2 classes, but the images have only the class "
            f"{spec.class_names[0]!r}; to train without labels, pass them as --unlabelled"
        )
    return build_model(name, outputs_of(spec), spec.image_size)


def outputs_of(spec: ImageSpec) -> int:
    """Return how many logits a model of the images' classes has; without classes one, unused."""
    return max(1, len(spec.class_names))


def input_spec(name: str, spec: ImageSpec) -> ImageSpec:
    """Return the images' spec with what a model normalises its input with."""
    wanted = model_input(name)
    if wanted.mean is None or wanted.std is None:
        return spec
    return dataclasses.replace(spec, mean=wanted.mean, std=wanted.std)


def start_from_weights(
    config: Config, student: nn.Module, num_classes: int
) -> LoadedWeights | None:
    """Load into a model the weights that its training starts from.

    Returns:
        What was loaded into a classifier; None for random weights, and for detectors.

    Raises:
        ConfigError: weights that its library does not have.
        DataError: weights that cannot be had or do not fit.
    """
    name, weights = config.model.student, config.model.student_weights
    family = family_of(name)
    if family is not None and family.loads_weights:
        if weights not in (None, NONE):
            family.load_weights(student, family_name(name), weights)
        return None
    if not isinstance(student, Detector):
        return load_classifier(student, name, num_classes, weights)
    if weights not in (None, NONE):
        load_weights(
            student, torchvision_file(name, weights) if weights in TORCHVISION_WEIGHTS else weights
        )
    return None


def is_model_name(given: str) -> bool:
    """Return whether a text names a model: a built-in one, or one of a family."""
    return given in classifier_names() or is_detector(given) or family_of(given) is not None


def is_model_file(teacher: str) -> bool:
    """Return whether ``--teacher`` means a file: it exists, or looks like a path."""
    if is_model_name(teacher):
        return False
    if teacher.endswith((".safetensors", ".pth", ".th", ".bin")):
        raise ConfigError(
            f"{teacher} contains weights, but not the name of their model; pass both (--teacher "
            "NAME --teacher-weights FILE)"
        )
    if teacher.endswith(".py"):
        return False
    return os.path.exists(teacher) or "/" in teacher or teacher.endswith(".pt")


def start_from_teacher(config: Config, student: nn.Module, teacher: nn.Module) -> list[str]:
    """Copy the teacher's neck and heads into a detector, if the settings say to inherit.

    Returns:
        The paths of the modules copied, none for a classifier.

    Raises:
        ConfigError: it is to inherit, and nothing fits.
    """
    if not isinstance(student, Detector) or not isinstance(teacher, Detector):
        return []
    wanted = config.model.inherit
    if wanted is None:
        nothing_else = config.model.student_weights in (None, NONE, "imagenet")
        wanted = distils(config) and nothing_else and bool(inheritable(student, teacher))
    return inherit(student, teacher) if wanted else []


def untrained_file(name: str, spec: ImageSpec, seed: int = 0) -> ModelFile:
    """Return the file of an untrained model for images; torch's generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = new_model(name, spec)
    spec = input_spec(name, spec)
    return ModelFile(
        name=name,
        class_names=spec.class_names,
        image_size=spec.image_size,
        mean=spec.mean,
        std=spec.std,
        state_dict=model.state_dict(),
        scores={},
        config="",
    )


def student_file(
    config: Config,
    spec: ImageSpec,
    state: Mapping[str, Any],
    scores: Mapping[str, float],
    weights: LoadedWeights | None = None,
) -> ModelFile:
    """Return what is saved for use: the student alone, of a checkpoint's "student" state.

    Args:
        config: of its training.
        spec: of the images.
        state: of the student.
        scores: what it reached.
        weights: that it started from; None for random ones.
    """
    spec = input_spec(config.model.student, student_spec(config, spec))
    return ModelFile(
        name=config.model.student,
        class_names=spec.class_names,
        image_size=spec.image_size,
        mean=spec.mean,
        std=spec.std,
        state_dict=dict(state),
        scores={name: float(score) for name, score in scores.items() if math.isfinite(score)},
        # what a model file says of an image must not depend on the data set any more
        config=to_yaml(with_settings(config, {"augment": spec.augment})),
        weights=weights.to_mapping() if weights is not None else {},
    )
