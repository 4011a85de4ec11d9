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
        mode: "as-is", "probe", "finetune" or "train"; never "auto".
    """

    model: nn.Module
    weights: LoadedWeights | None
    mode: str


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
    mode = _chosen_mode(config, model, weights, len(spec.class_names))
    return NamedTeacher(model=model, weights=weights, mode=mode)


def _chosen_mode(
    config: Config, model: nn.Module, weights: LoadedWeights | None, num_classes: int
) -> str:
    """Return ``--teacher-mode``, with "auto" resolved.

    Raises:
        ConfigError: weights that the mode cannot do with.
    """
    mode = config.model.teacher_mode
    if mode == "auto":
        if weights is None:
            return "train"
        return "as-is" if weights.is_whole else "probe"
    allowed = "train" if weights is None else "probe, finetune or train"
    name = short_name(config.model.teacher)
    if isinstance(model, Detector) and mode != "train":
        raise ConfigError(f"--teacher-mode {mode}: {name} is a detector (allowed: auto, train)")
    if weights is None and mode != "train":
        raise ConfigError(
            f"--teacher-mode {mode}: the weights of {name} are random: give --teacher-weights, or "
            f"--teacher-mode {allowed}"
        )
    if mode == "as-is" and weights is not None and not weights.is_whole:
        raise ConfigError(
            f"--teacher-mode as-is: {', '.join(weights.new_layers)} of {name} is new for the "
            f"{num_classes} classes of these images: give --teacher-weights of a model of these "
            f"classes, or --teacher-mode {allowed}"
        )
    return mode


def untrained_teacher_file(config: Config, spec: ImageSpec, teacher: NamedTeacher) -> ModelFile:
    """Return the model file of a teacher with the weights that it starts from."""
    state = teacher.model.state_dict()
    return student_file(teacher_alone(config), spec, state, {}, teacher.weights)
