"""One optimiser step, and the check before the first that every loss term reaches the student.

Shapes: B batch, C channels, H height, W width, T loss terms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from raygkd.engine.distributed import all_sum
from raygkd.engine.loop import Training
from raygkd.errors import ConfigError


def training_step(training: Training, batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
    """Change the student by one batch.

    Args:
        training: the run; its objective's parameters and optimiser change in place.
        batch: "image" uint8 (B, C, H, W) and the arrays of the task's targets.

    Returns:
        The unweighted loss terms and their weighted sum "total" (scalars), and the objective's
        output for the training meter, all detached.
    """
    terms, output = _forward(training, training.parallel, batch)
    training.optimizer.zero_grad(set_to_none=True)
    total = training.objective.total(terms, training.progress)
    training.scaler.scale(total).backward()
    if training.clip_norm is not None:
        training.scaler.unscale_(training.optimizer)
        clip_grad_norm_(training.objective.parameters(), training.clip_norm)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    training.schedule.step()
    values = {name: term.detach() for name, term in terms.items()}
    return values | {"total": total.detach()}, output


def _forward(
    training: Training, model: nn.Module, batch: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Any]:
    images_BCHW, targets = training.to_device(batch)
    with training.autocast():
        teacher = None
        if training.teacher is not None:
            seen_BCHW = training.teacher_normalise(images_BCHW)
            if training.recall is not None:
                teacher = training.recall(training.epoch, batch["row"], seen_BCHW)
            else:
                teacher = training.teacher(seen_BCHW)
            if training.objective.graph is not None:
                training.objective.graph.begin(teacher.features)
        return model(training.normalise(images_BCHW), targets, teacher)


def check_terms(training: Training, batch: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the ``gradient_norms`` of one batch, if every term reaches the student.

    A term that is zero, not finite, or does not move the student is a mistake in the set-up that
    would otherwise pass in silence. Only where no image has a box a detector's own loss may be
    zero. All ranks stop, or none.

    Raises:
        ConfigError: such a term, by name.
    """
    values, norms = gradient_norms(training, batch)
    labelled = all_sum(
        torch.tensor(float(not training.task.is_blank(batch)), device=training.device)
    )
    for name, norm in norms.items():
        value = values[name]
        reaches = math.isfinite(value) and value != 0.0 and math.isfinite(norm) and norm > 0.0
        if not reaches and not (name == "task" and value == 0.0 and labelled == 0.0):
            raise ConfigError(
                f"loss term '{name}' is {value:g} with a gradient of norm {norm:g} in the "
                "student at the first step, so the student cannot learn from it: check --levels, "
                "--dim and that the images differ, or set the term's weight to 0"
            )
    return norms


def measure_shares(training: Training, batch: Mapping[str, Tensor]) -> None:
    """Measure on a batch what shares of the labels' gradient are, as long as that is not fixed.

    A run whose weights are shares needs it once before its first ``training_step``; ``run_epoch``
    does it by itself. Every rank must call.
    """
    units = training.objective.units
    if units is not None and units.is_measuring:
        units.add(gradient_norms(training, batch)[1])


def gradient_norms(
    training: Training, batch: Mapping[str, Tensor]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the terms of one batch, and the norms of their gradients in the student's parameters.

    Terms and norms are unweighted. Several ranks average what they find, each on its own batch, so
    both are equal on all of them. Parameters, gradients and buffers stay as they were.
    """
    objective = training.objective
    buffers = {name: buffer.clone() for name, buffer in objective.named_buffers()}
    try:
        # what has been compiled for a step cannot go back more than once
        with torch.compiler.set_stance("force_eager"), objective.separate_terms():
            terms, _ = _forward(training, objective, batch)
        found = [[float(t.detach()), _gradient_norm(t, objective.student)] for t in terms.values()]
    finally:
        with torch.no_grad():
            for name, buffer in objective.named_buffers():
                buffer.copy_(buffers[name])
    found_T2 = torch.tensor(found, dtype=torch.float64, device=training.device)
    means_T2 = all_sum(found_T2) / all_sum(torch.ones_like(found_T2))
    values_T, norms_T = means_T2.T.tolist()
    return dict(zip(terms, values_T, strict=True)), dict(zip(terms, norms_T, strict=True))


def _gradient_norm(term: Tensor, student: nn.Module) -> float:
    """Return the norm of a scalar's gradient in all trainable parameters of the student."""
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    squares = [gradient.float().square().sum() for gradient in gradients if gradient is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0
