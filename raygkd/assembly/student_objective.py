"""Configuration -> the student with its losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from raygkd.assembly.matched_levels import matched_levels
from raygkd.assembly.methods import (
    matches_graphs,
    share_without_labels,
    student_spec,
    trains_last_layer,
)
from raygkd.assembly.models import (
    new_model,
    outputs_of,
    start_from_teacher,
    start_from_weights,
)
from raygkd.assembly.recipes import build_label_loss, check_recipe
from raygkd.config import OTHER_NAMES, Config, MethodConfig, owned_by
from raygkd.data.spec import ImageSpec
from raygkd.engine import BaselineTerm, ClassifierObjective, DetectorObjective, Objective
from raygkd.losses import (
    BaselineLoss,
    GraphDistillationLoss,
    baseline_class,
    baseline_loss,
    baseline_of,
)
from raygkd.models import Detector
from raygkd.models.fake_quantised import FakeQuantised, QuantisedGraph
from raygkd.models.heads import ProxyTap
from raygkd.registry import METHODS


def build_graph_loss(
    config: Config, teacher: nn.Module, student: nn.Module, spec: ImageSpec
) -> GraphDistillationLoss:
    """Return the graph loss between two models on the same images.

    Raises:
        ConfigError: unknown levels, or a spectral dimension too large for a level.
    """
    method = config.method
    matched = matched_levels(config, teacher, student, spec)
    return GraphDistillationLoss(
        matched.student_shapes,
        matched.teacher_shapes,
        temperature=method.temperature,
        relative_temperature=method.weights_unit == "gradient",
        graphs=method.graphs,
        dim=method.dim,
        alpha=method.alpha,
        beta=method.beta,
        gamma=method.gamma,
        mode=method.spectral_mode,
        attention=method.attention,
        weights=method.weights,
        adapter=method.adapter,
        centre=method.centre,
        foreground=method.foreground,
        canvas=spec.image_size[0],
    )


def build_baseline(
    config: Config, teacher: nn.Module, student: nn.Module, spec: ImageSpec
) -> tuple[nn.Module, BaselineTerm]:
    """Return the loss of another method between two models, and how it enters the total.

    Raises:
        ConfigError: unknown levels.
    """
    method = config.method
    name = baseline_of(method.method)
    assert name is not None
    known = baseline_class(name)
    settings = baseline_settings(config, name)
    if known.reads == "features":
        matched = matched_levels(config, teacher, student, spec)
        settings["levels"] = tuple(matched.pairs)
        settings["student_shapes"] = matched.student_shapes
        settings["teacher_shapes"] = matched.teacher_shapes
    if known.reads_proxies():
        settings["embedding_sizes"] = _embedding_sizes(student, teacher, spec)
    two_stage = isinstance(student, Detector) and student.is_two_stage
    loss = baseline_loss(name, canvas=spec.image_size[0], two_stage=two_stage, **settings)
    weight, task_weight = _weights(method, loss)
    term = BaselineTerm(
        name=name,
        weight=weight,
        task_weight=task_weight,
        ramp=known.ramp,
        reads_logits=known.reads == "logits",
    )
    return loss, term


def _embedding_sizes(student: nn.Module, teacher: nn.Module, spec: ImageSpec) -> tuple[int, int]:
    """Return the sizes of two classifiers' embeddings.

    Raises:
        ConfigError: a model's last layer is not linear.
    """
    taps = [ProxyTap(model, len(spec.class_names)) for model in (student, teacher)]
    for tap in taps:
        tap.remove()
    return taps[0].size, taps[1].size


def _weights(method: MethodConfig, loss: BaselineLoss) -> tuple[float, float]:
    """Return the weights of a baseline's loss and of the task's beside it."""
    if loss.name == "kd":
        return method.kd_weight, 1.0 - method.kd_weight
    return _share(method) or method.baseline_weight or loss.weight, loss.task_weight


def baseline_settings(config: Config, name: str) -> dict[str, Any]:
    """Return the settings of a baseline that are given, or have an option of their own."""
    options = {
        setting: getattr(config.method, other)
        for setting, other in owned_by(name, OTHER_NAMES).items()
        if setting in baseline_class(name).settings_for(two_stage=False)
    }
    return {**options, **owned_by(name, config.method.own)}


def build_objective(
    config: Config,
    spec: ImageSpec,
    teacher: nn.Module | None,
    graph: QuantisedGraph | None = None,
) -> Objective:
    """Return the student as its training begins, with its losses and their adapters, on the CPU.

    Args:
        config: the settings.
        spec: the images' classes and size.
        teacher: the model to learn from or to start from; None where the run needs none.
        graph: of a student that is trained in 8 bits; None in float.

    Raises:
        ConfigError: levels, a dimension or a package that the method cannot have, or a recipe that
            is not for the task.
    """
    check_recipe(config, spec.task)
    torch.manual_seed(config.optim.seed)
    student = _new_student(config, spec) if graph is None else FakeQuantised(graph)
    method = config.method.method
    parts: dict[str, Any] = {}
    if teacher is not None:
        start_from_teacher(config, student, teacher)
    if teacher is not None and matches_graphs(method):
        parts["graph"] = build_graph_loss(config, teacher, student, spec)
        parts["levels"] = tuple(parts["graph"].student_shapes)
    if teacher is not None and baseline_of(method) is not None:
        baseline, term = build_baseline(config, teacher, student, spec)
        parts |= {"baseline": baseline, "baseline_term": term}
        if baseline_class(term.name).reads_proxies():
            parts["proxies"] = ProxyTap(student, len(spec.class_names))
        if not term.reads_logits:
            parts["levels"] = tuple(matched_levels(config, teacher, student, spec).pairs)
    share = share_without_labels(config, spec)
    task_weight = 0.0 if share == 1 else config.method.task_weight
    parts |= {
        "shares": _shares(config.method),
        "task_weight": task_weight if parts else None,
        "trains_all": trains_last_layer(config, spec),
        "freeze_batch_norm": config.optim.freeze_batch_norm,
    }
    if isinstance(student, Detector):
        return DetectorObjective(student, **parts)
    label_loss = build_label_loss(config.recipe, spec, partly=share > 0)
    return ClassifierObjective(student, label_loss=label_loss, **parts)


def _new_student(config: Config, spec: ImageSpec) -> nn.Module:
    own = student_spec(config, spec)
    student = new_model(config.model.student, own)
    start_from_weights(config, student, outputs_of(own))
    return student


def _shares(method: MethodConfig) -> list[str]:
    """Return the terms whose weights are shares of the labels' gradient.

    What was published for a baseline is a factor of its loss, and so is the weight of kd.
    """
    if method.weights_unit != "gradient":
        return []
    baseline = baseline_of(method.method)
    shares = ["vertex", "edge", "spectral"]
    if baseline is not None and _share(method) is not None:
        shares.append(baseline)
    return shares


def _share(method: MethodConfig) -> float | None:
    """Return a baseline's weight as a share of the labels' gradient; None where it is a factor."""
    if method.weights_unit != "gradient" or baseline_of(method.method) == "kd":
        return None
    return method.baseline_weight or METHODS.get(method.method).baseline_share
