"""Configurations derived from that of a run: for its teacher, its control and its baseline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raygkd.config import Config, MethodConfig, flag, settings, with_settings
from raygkd.errors import ConfigError

# learning rate of a fine-tuned teacher's backbone, as a share of --lr, where the settings say none
FINE_TUNING_FACTOR = 0.1


def teacher_alone(config: Config) -> Config:
    """Return the configuration that trains the teacher's model instead of the student."""
    side = config.data.teacher_image_size
    return with_settings(
        config,
        {
            **({} if side is None else {"image_size": side}),
            "student": config.model.teacher,
            "student_weights": config.model.teacher_weights,
            "inherit": False,
            "method": "none",
            "levels": None,
            # a teacher is trained on labels alone
            "unlabelled_share": 0.0,
        },
    )


def teacher_training(config: Config) -> Config:
    """Return the configuration that trains the teacher of a run.

    Raises:
        ConfigError: the warm-up, or the epochs with a frozen backbone, are too many for it.
    """
    for name in ("warmup_epochs", "freeze_epochs"):
        epochs = getattr(config.optim, name)
        if epochs >= config.model.teacher_epochs:
            raise ConfigError(
                f"{flag(name)} {epochs}: applies to the teacher, too, so it must be below "
                f"--teacher-epochs {config.model.teacher_epochs}"
            )
    # the grace period belongs to the search and may exceed the teacher's epochs
    changes: dict[str, Any] = {"epochs": config.model.teacher_epochs, "grace_period": 1}
    if config.model.teacher_mode == "finetune" and config.optim.backbone_lr_factor == 1.0:
        changes["backbone_lr_factor"] = FINE_TUNING_FACTOR
    return with_settings(teacher_alone(config), changes)


def student_alone(config: Config, params: Mapping[str, Any]) -> Config:
    """Return the control of a trial: the same student, trained without the teacher.

    Args:
        config: configuration of the search.
        params: the trial's settings; the control has the same learning rate.
    """
    return with_settings(config, without_teacher(params))


def without_teacher(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of ``student_alone``."""
    return {**params, "method": "none", "inherit": False}


def logit_baseline(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the plain logit distillation with which a trial is compared.

    Args:
        params: the trial's settings. The baseline has the same models, images, optimiser and
            recipe, and the default settings of logit distillation.
    """
    known = settings()
    kept = {name: value for name, value in params.items() if known[name][0] != "method"}
    return {
        **kept,
        "method": "kd",
        "kd_temperature": MethodConfig.kd_temperature,
        "kd_weight": MethodConfig.kd_weight,
    }
