"""A teacher that is named, with weights: whether it is trained first, or used as it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from raygkd.assembly.derived_configs import teacher_alone
from raygkd.assembly.models import new_model, start_from_weights, student_file
from raygkd.config import Config
from raygkd.data.spec import ImageSpec
from raygkd.errors import ConfigError
from raygkd.models import Detector, LoadedWeights, ModelFile, short_name


@dataclass(frozen=True, kw_only=True, eq=False)
class NamedTeacher:
    """A teacher that ``--teacher`` names, before any training.

    Attributes:
        model: with the weights that it starts from.
        weights: what was loaded; None for random weights, and for detectors.
        is_ready: it is used as it is.
    """

    model: nn.Module
    weights: LoadedWeights | None
    is_ready: bool


def named_teacher(config: Config, spec: ImageSpec) -> NamedTeacher:
    """Return the teacher of a run whose ``--teacher`` is a name.

    Raises:
        ConfigError: an unknown name, or one that is to be used as it is and is not trained.
        DataError: its weights cannot be had or do not fit.
    """
    alone = teacher_alone(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.optim.seed)
        model = new_model(alone.model.student, spec)
        weights = start_from_weights(alone, model, len(spec.class_names))
    mode = config.model.teacher_mode
    is_trained = weights is not None and weights.is_whole
    if mode == "as-is" and not is_trained:
        name, classes = short_name(config.model.teacher), len(spec.class_names)
        reason = (
            "detectors are trained first"
            if isinstance(model, Detector)
            else "its weights are random"
            if weights is None
            else f"{', '.join(weights.new_layers)} is new for the {classes} classes of these images"
        )
        raise ConfigError(
            f"--teacher-mode as-is: {name} is not trained for these images ({reason}): give "
            "--teacher-weights of a model of these classes, or --teacher-mode train"
        )
    return NamedTeacher(model=model, weights=weights, is_ready=is_trained and mode != "train")


def ready_teacher_file(config: Config, spec: ImageSpec, teacher: NamedTeacher) -> ModelFile:
    """Return the model file of a teacher that is used as it is."""
    state = teacher.model.state_dict()
    return student_file(teacher_alone(config), spec, state, {}, teacher.weights)
