"""Configuration -> core objects.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raygkd.config import Config, to_yaml, with_settings
from raygkd.engine import Objective, Teacher, Training
from raygkd.engine.loop import Stream
from raygkd.engine.schedule import lr_factor
from raygkd.errors import ConfigError
from raygkd.losses import GraphDistillationLoss
from raygkd.models import (
    ModelFile,
    build_classifier,
    build_from_file,
    check_levels,
    classifier_names,
    feature_shapes,
    stage_modules,
)


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """What models must know of the images.

    Attributes:
        class_names: the classes, in the order of the labels.
        image_size: height and width of the model input in pixels.
        mean, std: per channel, of pixels scaled to 0..1.
    """

    class_names: tuple[str, ...]
    image_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def normaliser(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Return the function of images (B, C, H, W) in 0..1 to (image - mean) / std."""
    mean_1C11 = torch.tensor(mean, device=device).view(1, -1, 1, 1)
    std_1C11 = torch.tensor(std, device=device).view(1, -1, 1, 1)
    return lambda images_BCHW: (images_BCHW - mean_1C11) / std_1C11


def is_model_file(teacher: str) -> bool:
    """Return whether ``--teacher`` means a file: it exists, or looks like a path."""
    if teacher in classifier_names() or teacher.startswith("torchvision:"):
        return False
    return Path(teacher).exists() or "/" in teacher or teacher.endswith(".pt")


def teacher_training(config: Config) -> Config:
    """Return the configuration that trains the teacher of a run by itself.

    Raises:
        ConfigError: the warm-up is too long for it.
    """
    if config.optim.warmup_epochs >= config.model.teacher_epochs:
        raise ConfigError(
            f"--warmup-epochs {config.optim.warmup_epochs}: the teacher is trained with it too, so "
            f"it must be below --teacher-epochs {config.model.teacher_epochs}"
        )
    return with_settings(
        config,
        {
            "student": config.model.teacher,
            "method": "none",
            "levels": None,
            "epochs": config.model.teacher_epochs,
            # of the search, which may be longer than the teacher's training
            "grace_period": 1,
        },
    )


def student_alone(config: Config) -> Config:
    """Return the same run without its teacher: the control every distilled student is held to."""
    return with_settings(config, {"method": "none"})


def check_teacher(teacher: ModelFile, spec: ImageSpec, where: str) -> None:
    """Refuse a teacher of other classes.

    Raises:
        ConfigError: its classes are not the data's, in the same order.
    """
    if teacher.class_names != spec.class_names:
        known, wanted = (
            f"{len(names)} classes ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
            for names in (teacher.class_names, spec.class_names)
        )
        raise ConfigError(
            f"--teacher {where}: it knows {known} but the data has {wanted}: train a teacher on "
            "this data with 'raygkd teacher'"
        )


def chosen_levels(config: Config, teacher: nn.Module, student: nn.Module) -> tuple[int, ...]:
    """Return the levels a run matches: ``--levels``, or all that both models have.

    Raises:
        ConfigError: a level that one of the models lacks.
    """
    shared = sorted(set(stage_modules(teacher)) & set(stage_modules(student)))
    levels = config.method.levels if config.method.levels is not None else tuple(shared)
    check_levels(levels, teacher, f"teacher {config.model.teacher}")
    check_levels(levels, student, f"student {config.model.student}")
    return levels


def build_graph_loss(
    config: Config, teacher: nn.Module, student: nn.Module, image_size: tuple[int, int]
) -> GraphDistillationLoss:
    """Return the graph loss between two models on images of one size.

    Raises:
        ConfigError: unknown levels, or a spectral dimension too large for a level.
    """
    method = config.method
    levels = chosen_levels(config, teacher, student)
    return GraphDistillationLoss(
        feature_shapes(student, levels, image_size),
        feature_shapes(teacher, levels, image_size),
        temperature=method.temperature,
        dim=method.dim,
        alpha=method.alpha,
        beta=method.beta,
        gamma=method.gamma,
        mode=method.spectral_mode,
        attention=method.attention,
        weights=method.weights,
    )


def level_shapes(
    config: Config, teacher: nn.Module, spec: ImageSpec
) -> dict[int, tuple[int, int, int]]:
    """Return level -> (C, H, W) of the teacher, of all levels that both models have."""
    student = build_classifier(config.model.student, len(spec.class_names))
    every = with_settings(config, {"levels": None})
    return feature_shapes(teacher, chosen_levels(every, teacher, student), spec.image_size)


def uses_teacher(config: Config) -> bool:
    """Return whether the method needs a teacher."""
    return config.method.method != "none"


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype of autocast for ``--amp`` on a device, or None for full precision."""
    if amp == "auto":
        amp = "bf16" if device.type == "cuda" else "none"
    return {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def build_training(
    config: Config,
    *,
    spec: ImageSpec,
    teacher_file: ModelFile | None,
    stream: Stream,
    device: torch.device,
    rank: int = 0,
    parallel: Callable[[nn.Module], nn.Module] = lambda module: module,
) -> Training:
    """Return a run of one rank, ready for its first epoch.

    Args:
        config: the settings.
        spec: the images' classes, size and normalisation.
        teacher_file: the teacher; None where the method needs none.
        stream: the rank's images.
        device: where to train.
        rank: of this process.
        parallel: wraps the objective for several ranks (DDP).
    """
    optim = config.optim
    objective, teacher_model = _build_models(config, spec, teacher_file, device)
    optimizer = torch.optim.SGD(
        objective.parameters(),
        lr=optim.lr,
        momentum=optim.momentum,
        weight_decay=optim.weight_decay,
    )
    amp = amp_dtype(optim.amp, device)
    normalise = normaliser(spec.mean, spec.std, device)
    teacher_side = teacher_file if teacher_file is not None else spec
    return Training(
        objective=objective,
        parallel=parallel(objective),
        teacher=teacher_model,
        stream=stream,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            functools.partial(lr_factor, steps_per_epoch=stream.steps_per_epoch, optim=optim),
        ),
        scaler=torch.amp.GradScaler(device.type, enabled=amp == torch.float16),
        normalise=normalise,
        teacher_normalise=normaliser(teacher_side.mean, teacher_side.std, device),
        device=device,
        num_classes=len(spec.class_names),
        epochs=optim.epochs,
        seed=optim.seed,
        rank=rank,
        clip_norm=optim.clip_norm,
        amp=amp,
        config=to_yaml(config),
    )


def _build_models(
    config: Config, spec: ImageSpec, teacher_file: ModelFile | None, device: torch.device
) -> tuple[Objective, Teacher | None]:
    method = config.method.method
    torch.manual_seed(config.optim.seed)
    student = build_classifier(config.model.student, len(spec.class_names))
    teacher_model, graph = None, None
    levels: tuple[int, ...] = ()
    if uses_teacher(config):
        if teacher_file is None:
            raise ValueError(f"method {method!r} needs a teacher")
        teacher_model = build_from_file(teacher_file)
        if "graph" in method:
            levels = chosen_levels(config, teacher_model, student)
            graph = build_graph_loss(config, teacher_model, student, spec.image_size)
        teacher_model.to(device)
    objective = Objective(
        student,
        levels=levels,
        graph=graph,
        kd_weight=config.method.kd_weight if "kd" in method else 0.0,
        kd_temperature=config.method.kd_temperature,
    ).to(device)
    teacher = Teacher(teacher_model, levels) if teacher_model is not None else None
    # only now, when both models have their taps
    if config.optim.compile:
        student.compile()
        if teacher is not None:
            teacher.model.compile()
    return objective, teacher


def student_file(
    config: Config, spec: ImageSpec, state: Mapping[str, Any], scores: Mapping[str, float]
) -> ModelFile:
    """Return what is saved for use: the student alone, of a checkpoint's "student" state."""
    return ModelFile(
        name=config.model.student,
        class_names=spec.class_names,
        image_size=spec.image_size,
        mean=spec.mean,
        std=spec.std,
        state_dict=dict(state),
        scores={name: float(score) for name, score in scores.items() if math.isfinite(score)},
        config=to_yaml(config),
    )


class DeployedClassifier(nn.Module):
    """A classifier with its normalisation: images (B, 3, H, W) in 0..1 to logits (B, K)."""

    def __init__(self, model_file: ModelFile):
        super().__init__()
        self.model = build_from_file(model_file)
        self.mean_1C11: Tensor
        self.std_1C11: Tensor
        self.register_buffer("mean_1C11", torch.tensor(model_file.mean).view(1, -1, 1, 1))
        self.register_buffer("std_1C11", torch.tensor(model_file.std).view(1, -1, 1, 1))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return class scores."""
        return self.model((images_BCHW - self.mean_1C11) / self.std_1C11)
