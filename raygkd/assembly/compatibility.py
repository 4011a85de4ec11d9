"""Checks that settings, models and images are compatible."""

from __future__ import annotations

from raygkd.assembly.methods import reads_logits, scores_teacher, suits
from raygkd.assembly.recipes import check_recipe
from raygkd.config import Config
from raygkd.data.box_transforms import build_box_transform
from raygkd.data.spec import ImageSpec
from raygkd.data.transforms import build_transform
from raygkd.data.unlabelled import lacks_labels
from raygkd.errors import ConfigError
from raygkd.metrics.ranking import check_score
from raygkd.models import ModelFile, check_image_size, family_of, is_classifier, is_detector
from raygkd.registry import METHODS


def check_kind(name: str, task: str) -> None:
    """Check that a model is for the task of the images; unknown names pass.

    Raises:
        ConfigError: the model is for a different task.
    """
    if is_detector(name) and task == "classification":
        raise ConfigError(
            f"{name} is a detector, but the images have labels and no boxes; choose a classifier "
            "such as resnet8"
        )
    if is_classifier(name) and task == "detection":
        raise ConfigError(
            f"{name} is a classifier, but the images have boxes; choose a detector such as "
            "retinanet_resnet18_fpn"
        )


def check_settings(config: Config, task: str) -> None:
    """Check that the settings apply to the task of the images.

    Raises:
        ConfigError: method, score, image size or augmentation do not support the task, or a setting
            applies to detectors only.
    """
    size, augment = config.data.image_size, config.data.augment
    method = config.method.method
    check_score(config.data.score, task, has_labels=not lacks_labels(config.data.dataset))
    option = "--methods" if config.compare.methods else "--method"
    if not suits(method, task):
        others = [name for name in METHODS.names() if suits(name, task)]
        raise ConfigError(
            f"{option} {method}: does not support {task}, the task of these images (allowed: "
            f"{', '.join(others)})"
        )
    check_recipe(config, task)
    if reads_logits(method) and not scores_teacher(config):
        others = [name for name in METHODS.names() if suits(name, task) and not reads_logits(name)]
        raise ConfigError(
            f"--method {method}: reads the teacher's logits, which --teacher-mode features does "
            f"not use (allowed: {', '.join(others)})"
        )
    if task == "detection":
        if size is not None:
            check_image_size(size)
        if augment != "auto":
            build_box_transform(augment, size or 32, train=True, most=1)
    else:
        if augment != "auto":
            build_transform(augment, size or 32, train=True)
        # for detectors it is set by default, and check_kind rejects the model
        is_default = any(map(is_detector, (config.model.student, config.model.teacher)))
        detection_settings = {
            "--foreground": config.method.foreground and not is_default,
            "--inherit": config.model.inherit,
        }
        for flag, value in detection_settings.items():
            if value:
                raise ConfigError(
                    f"{flag}: applies to detectors only, and these images have no boxes; omit it"
                )


def loads_weights(name: str) -> bool:
    """Return whether the model's family loads trained weights."""
    family = family_of(name)
    return family is not None and family.loads_weights


def check_teacher(teacher: ModelFile, spec: ImageSpec) -> None:
    """Check that a teacher has the task and the classes of the images.

    Raises:
        ConfigError: the task differs, or the classes or their order differ.
    """
    check_kind(teacher.name, spec.task)
    check_classes(teacher.class_names, spec, "train a teacher on this data with 'raygkd teacher'")


def check_classes(class_names: tuple[str, ...], spec: ImageSpec, advice: str) -> None:
    """Check that a model has the classes of the images.

    Args:
        class_names: classes of the model.
        spec: spec of the images.
        advice: what to do, for the message.

    Raises:
        ConfigError: the classes or their order differ.
    """
    if not class_names:
        raise ConfigError(f"it has no classes, since it learned only feature maps; {advice}")
    if class_names != spec.class_names:
        model_classes, image_classes = (
            f"{len(names)} classes ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
            for names in (class_names, spec.class_names)
        )
        raise ConfigError(f"it has {model_classes}, but the data has {image_classes}; {advice}")
