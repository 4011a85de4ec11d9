"""Whether settings, models and images go together."""

from __future__ import annotations

from raygkd.assembly.methods import suits
from raygkd.config import Config
from raygkd.data.box_transforms import build_box_transform
from raygkd.data.spec import ImageSpec
from raygkd.data.transforms import build_transform
from raygkd.errors import ConfigError
from raygkd.models import ModelFile, check_image_size, family_of, is_classifier, is_detector
from raygkd.registry import METHODS


def check_kind(name: str, task: str) -> None:
    """Refuse a classifier for detection, or the other way round; an unknown name is neither.

    Raises:
        ConfigError: the model is for another task than the images.
    """
    if is_detector(name) and task == "classification":
        raise ConfigError(
            f"{name} is a detector, and the images have labels but no boxes: choose a classifier "
            "such as resnet8"
        )
    if is_classifier(name) and task == "detection":
        raise ConfigError(
            f"{name} is a classifier, and the images have boxes: choose a detector such as "
            "retinanet_resnet18_fpn"
        )


def check_settings(config: Config, task: str) -> None:
    """Refuse settings that the images' task does not know.

    Raises:
        ConfigError: a method of the other task or an image size it does not take, random changes of
            the other task, or settings of detectors for classifiers.
    """
    size, augment = config.data.image_size, config.data.augment
    method = config.method.method
    if not suits(method, task):
        others = [name for name in METHODS.names() if suits(name, task)]
        raise ConfigError(
            f"--method {method}: does not support {task}, the task of these images (allowed: "
            f"{', '.join(others)})"
        )
    if task == "detection":
        if size is not None:
            check_image_size(size)
        if augment != "auto":
            build_box_transform(augment, size or 32, train=True, most=1)
    else:
        if augment != "auto":
            build_transform(augment, size or 32, train=True)
        # with a detector it is a default, and the model is refused elsewhere
        is_default = any(map(is_detector, (config.model.student, config.model.teacher)))
        given = {
            "--score": config.data.score != "auto",
            "--foreground": config.method.foreground and not is_default,
            "--inherit": config.model.inherit,
        }
        for flag, value in given.items():
            if value:
                raise ConfigError(
                    f"{flag}: applies to detectors only, and these images have no boxes"
                )


def loads_weights(name: str) -> bool:
    """Return whether a model is of a family that loads trained weights."""
    family = family_of(name)
    return family is not None and family.loads_weights


def check_teacher(teacher: ModelFile, spec: ImageSpec) -> None:
    """Refuse a teacher of other classes, or for another task.

    Raises:
        ConfigError: it is for another task, or its classes are not the data's, in the same order.
    """
    check_kind(teacher.name, spec.task)
    check_classes(teacher.class_names, spec, "train a teacher on this data with 'raygkd teacher'")


def check_classes(class_names: tuple[str, ...], spec: ImageSpec, advice: str) -> None:
    """Refuse a model of other classes than the images'.

    Args:
        class_names: of the model.
        spec: of the images.
        advice: what to do, for the message.

    Raises:
        ConfigError: they are not the same, in the same order.
    """
    if class_names != spec.class_names:
        known, wanted = (
            f"{len(names)} classes ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
            for names in (class_names, spec.class_names)
        )
        raise ConfigError(f"it knows {known} but the data has {wanted}: {advice}")
