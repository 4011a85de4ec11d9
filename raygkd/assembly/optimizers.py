"""The optimiser of a run, with smaller learning rates for the parts that are trained already."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from raygkd.config import OptimConfig
from raygkd.engine.schedule import lr_factor

Parameters = Iterable[nn.Parameter] | Sequence[dict[str, Any]]


@dataclass(frozen=True)
class RateGroup:
    """Parameters that share a learning rate.

    Attributes:
        parameters: of the group.
        factor: its learning rate as a share of ``--lr``.
        frozen_epochs: first epochs in which the learning rate is 0.
    """

    parameters: tuple[nn.Parameter, ...]
    factor: float = 1.0
    frozen_epochs: int = 0


def build_optimizer(optim: OptimConfig, parameters: Parameters) -> torch.optim.Optimizer:
    """Return the optimiser of parameters, or of groups of them as torch takes them."""
    if optim.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters,
            lr=optim.lr,
            betas=(optim.momentum, 0.999),
            weight_decay=optim.weight_decay,
        )
    return torch.optim.SGD(
        parameters, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay
    )


def optimizer_and_schedule(
    optim: OptimConfig, module: nn.Module, student: nn.Module, steps_per_epoch: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Return the optimiser of a module's parameters and its learning rate over the steps.

    Args:
        optim: the settings.
        module: whose parameters are trained.
        student: the part of it whose backbone may have smaller rates.
        steps_per_epoch: optimiser steps in an epoch.
    """
    groups = rate_groups(optim, module, student)
    optimizer = build_optimizer(
        optim,
        [{"params": list(group.parameters), "lr": optim.lr * group.factor} for group in groups],
    )
    factors: list[Callable[[int], float]] = [
        functools.partial(
            _factor,
            optim=optim,
            steps_per_epoch=steps_per_epoch,
            frozen_steps=group.frozen_epochs * steps_per_epoch,
        )
        for group in groups
    ]
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factors)


def _factor(step: int, optim: OptimConfig, steps_per_epoch: int, frozen_steps: int) -> float:
    return 0.0 if step < frozen_steps else lr_factor(step, steps_per_epoch, optim)


def rate_groups(optim: OptimConfig, module: nn.Module, student: nn.Module) -> list[RateGroup]:
    """Return a module's parameters by their learning rates; one group where all have the same.

    The student's last layer and parts outside the student, such as adapters, have ``--lr``.
    The rest of the student is its backbone: ``--backbone-lr-factor`` times ``--lr``, and per layer
    before the last ``--layer-decay`` times that of the next one.
    """
    if optim.backbone_lr_factor == optim.layer_decay == 1.0 and optim.freeze_epochs == 0:
        return [RateGroup(tuple(module.parameters()))]
    *layers, _ = student_layers(student)
    backbone = {id(parameter) for layer in layers for parameter in layer}
    rest = tuple(p for p in module.parameters() if id(p) not in backbone)
    groups = [RateGroup(rest)]
    for depth, layer in enumerate(layers):
        factor = optim.backbone_lr_factor * optim.layer_decay ** (len(layers) - 1 - depth)
        groups.append(RateGroup(tuple(layer), factor, optim.freeze_epochs))
    return groups


def student_layers(student: nn.Module) -> list[list[nn.Parameter]]:
    """Return a model's parameters by layer, in the order of the model's own; the head is the last.

    A layer is a child of the outermost Sequential or ModuleList that a parameter is in, such as a
    transformer's block, else the child of the model that it is in.
    """
    layers: dict[str, list[nn.Parameter]] = {}
    for path, parameter in student.named_parameters():
        layers.setdefault(_layer_of(student, path), []).append(parameter)
    return list(layers.values())


def _layer_of(model: nn.Module, path: str) -> str:
    parts = path.split(".")
    module, inside_container = model, isinstance(model, nn.Sequential)
    for depth, part in enumerate(parts[:-1], start=1):
        module = module.get_submodule(part)
        if inside_container:
            return ".".join(parts[:depth])
        inside_container = isinstance(module, nn.Sequential | nn.ModuleList)
    return ".".join(parts[:-1])
