"""Training images without labels: settings, checks, and the student's classes."""

from __future__ import annotations

from typing import Any

from raygkd.assembly.given_teacher import weights_class_names
from raygkd.assembly.methods import distils, share_without_labels, suits, trains_last_layer
from raygkd.assembly.models import is_model_file
from raygkd.assembly.text_teachers import reads_texts
from raygkd.config import Config, flag, with_settings
from raygkd.data.spec import ImageSpec
from raygkd.data.unlabelled import lacks_labels
from raygkd.errors import ConfigError
from raygkd.losses import reads_labels, trains_classifier
from raygkd.models import read_class_names, short_name, starts_trained
from raygkd.registry import METHODS

# modes of a teacher that is not trained on labels
_AS_GIVEN = ("auto", "as-is", "features")


def without_labels(config: Config) -> Config:
    """Return a configuration whose defaults are those for steps without labels, if it has such.

    The teacher is used as it is, or its feature maps alone if the method reads no more. The score
    is the agreement with the teacher or the similarity of the features; with labelled images for
    validation, that of their nearest neighbours where the student has no classes.
    """
    data, reads_logits = config.data, trains_classifier(config.method.method)
    changes: dict[str, Any] = {}
    if lacks_labels(data.dataset):
        if not reads_logits and config.model.teacher_mode in _AS_GIVEN:
            changes["teacher_mode"] = "features"
        if data.score == "auto":
            changes["score"] = "agreement" if reads_logits else "cka"
    elif data.unlabelled_share == 1 and data.score == "auto" and not reads_logits:
        changes["score"] = "knn"
    return with_settings(config, changes) if changes else config


def check_without_labels(config: Config, role: str) -> None:
    """Check that nothing needs the labels of images that have none, before they are opened.

    Args:
        config: of the run.
        role: of the run, as in ``open_session``.

    Raises:
        ConfigError: a command, a method, a teacher or a setting that needs labels.
    """
    if not lacks_labels(config.data.dataset):
        if config.data.unlabelled is not None and config.data.unlabelled_share and distils(config):
            _check_method(config)
        return
    if role in ("teacher", "comparison"):
        command = {"teacher": "teacher", "comparison": "compare"}[role]
        raise ConfigError(
            f"raygkd {command}: needs images with labels; add --data-dir, or use raygkd train"
        )
    if config.data.unlabelled is not None:
        raise ConfigError(
            "--unlabelled: the images of --dataset unlabelled have no labels already; omit one of "
            "the two options"
        )
    if config.data.unlabelled_share == 0:
        raise ConfigError(
            "--unlabelled-share 0: no image has a label, so none would be left to train on; omit it"
        )
    _check_method(config)
    if config.data.score == "agreement" and not trains_classifier(config.method.method):
        raise ConfigError(
            f"--score agreement: compares classes, but --method {config.method.method} teaches the "
            "student none; choose --score cka"
        )
    name, mode = config.model.teacher, config.model.teacher_mode
    if mode not in _AS_GIVEN:
        raise ConfigError(
            f"--teacher-mode {mode}: trains on labels, but no image has one (allowed: "
            f"{', '.join(_AS_GIVEN)})"
        )
    if not is_model_file(name) and not starts_trained(name, config.model.teacher_weights):
        raise ConfigError(
            f"--teacher {short_name(name)}: its weights are random, and it cannot be trained "
            "without labels; pass a teacher with pretrained weights, --teacher-weights FILE, or a "
            "model file"
        )
    _refuse_settings(
        "no image has one",
        task_weight=bool(config.method.task_weight),
        class_weights=config.recipe.class_weights != "none",
        repeat=bool(config.search.repeat),
    )


def check_share(config: Config, spec: ImageSpec) -> None:
    """Refuse settings that do not suit the share of the images that has no labels.

    Raises:
        ConfigError: says which.
    """
    share = share_without_labels(config, spec)
    if share and spec.has_labels:
        _check_method(config)
    if config.data.unlabelled_share == 1 and not spec.unlabelled:
        raise ConfigError(
            "--unlabelled-share 1: there are no images without labels; add --unlabelled"
        )
    if share < 1 or not spec.has_labels:
        return
    _refuse_settings(
        "--unlabelled-share 1 trains on none",
        task_weight=bool(config.method.task_weight),
        class_weights=config.recipe.class_weights != "none",
    )
    if not trains_last_layer(config, spec) and spec.score != "knn":
        raise ConfigError(
            f"--score {spec.score}: reads the student's last layer, which --method "
            f"{config.method.method} does not train without labels; choose --score knn"
        )


def student_class_names(config: Config) -> tuple[str, ...]:
    """Return the classes of a student that no image has a label for: its teacher's.

    () if its last layer is not trained.

    Raises:
        ConfigError: the names of the teacher's classes are not known.
    """
    method = config.method.method
    if not lacks_labels(config.data.dataset) or not trains_classifier(method):
        return ()
    names, option = weights_class_names(config), "--teacher-classes"
    if reads_texts(config):
        option = "--class-names"
        if config.model.class_names is not None:
            names = read_class_names(config.model.class_names)
    if not names:
        others = [one for one in _allowed() if not trains_classifier(one)]
        raise ConfigError(
            f"--method {method}: without labels the student gets the classes of its teacher, but "
            f"the class names of {short_name(config.model.teacher)} are not known; pass "
            f"{option} FILE, or choose another method ({', '.join(others)})"
        )
    return names


def _check_method(config: Config) -> None:
    method = config.method.method
    if method == "none" or reads_labels(method):
        raise ConfigError(
            f"--method {method}: reads the labels of all images, but some have none (allowed: "
            f"{', '.join(_allowed())})"
        )


def _allowed() -> list[str]:
    """Return the methods for classifiers that read no labels."""
    return [
        name
        for name in METHODS.names()
        if name != "none" and suits(name, "classification") and not reads_labels(name)
    ]


def _refuse_settings(reason: str, **wrong: bool) -> None:
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise ConfigError(f"{flag(name)}: applies to labels, but {reason}; omit it")
