"""The requirements of a method: a task, a teacher, a baseline."""

from __future__ import annotations

import dataclasses

from raygkd.config import OTHER_NAMES, Config
from raygkd.data.spec import ImageSpec
from raygkd.data.unlabelled import lacks_labels
from raygkd.losses import baseline_class, baseline_of, trains_classifier
from raygkd.registry import METHODS


def suits(method: str, task: str) -> bool:
    """Return whether a method supports a task."""
    baseline = baseline_of(method)
    return baseline is None or baseline_class(baseline).task == task


def matches_graphs(method: str) -> bool:
    """Return whether a method matches graphs of channels."""
    return METHODS.get(method).matches_graphs


def reads_setting(method: str, name: str) -> bool:
    """Return whether a setting changes a method; settings that belong to no method change all.

    Args:
        method: name of the method.
        name: of the setting, METHOD.SETTING for one of a registered method.
    """
    baseline = baseline_of(method)
    if "." in name:
        owners = {name.partition(".")[0]}
    else:
        owners = {key.partition(".")[0] for key, other in OTHER_NAMES.items() if other == name}
    if name == "levels":
        return matches_graphs(method) or (baseline is not None and not reads_logits(method))
    if name == "baseline_weight":
        return baseline is not None and baseline != "kd"
    if name == "task_weight":
        return method != "none"
    if owners == {"graph"}:
        return matches_graphs(method)
    return not owners & set(METHODS.names()) or bool(owners & {method, baseline})


def reads_logits(method: str) -> bool:
    """Return whether a method reads the teacher's logits, alone or beside its feature maps."""
    baseline = baseline_of(method)
    return baseline is not None and baseline_class(baseline).reads == "logits"


def scores_teacher(config: Config) -> bool:
    """Return whether the logits of a run's teacher mean the classes of the images."""
    return config.model.teacher_mode != "features"


def fades(config: Config) -> bool:
    """Return whether the weights of a run's graph losses follow the teacher's lead."""
    is_ours = matches_graphs(config.method.method) and config.method.fade == "lead"
    # with neither labels nor teacher there would be nothing left to learn from
    return is_ours and scores_teacher(config) and config.method.task_weight != 0


def share_without_labels(config: Config, spec: ImageSpec) -> float:
    """Return the share of each batch of a student that has no labels, from 0 to 1.

    It is 0 where the student learns from labels alone.
    """
    return share_of_epoch(config, spec) if distils(config) else 0.0


def share_of_epoch(config: Config, spec: ImageSpec) -> float:
    """Return the share of images without labels by which the steps of an epoch are counted."""
    if not spec.unlabelled:
        return 0.0
    return 1.0 if lacks_labels(config.data.dataset) else config.data.unlabelled_share


def trains_last_layer(config: Config, spec: ImageSpec) -> bool:
    """Return whether a student's last layer is trained: by labels, or by its teacher's logits."""
    return share_without_labels(config, spec) < 1 or trains_classifier(config.method.method)


def student_spec(config: Config, spec: ImageSpec) -> ImageSpec:
    """Return the images' spec, without classes if the student's last layer is not trained."""
    if trains_last_layer(config, spec):
        return spec
    return dataclasses.replace(spec, class_names=())


def uses_teacher(config: Config) -> bool:
    """Return whether a run needs a teacher, for distillation or for initial weights."""
    return distils(config) or bool(config.model.inherit)


def distils(config: Config) -> bool:
    """Return whether a run's student learns from a teacher."""
    return config.method.method != "none"
