"""One optimiser step, and a check before the first that every loss term trains the student.

Shapes: B batch, C channels, H height, W width, T loss terms.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from raygkd.engine.distributed import all_sum
from raygkd.engine.loop import Training
from raygkd.errors import ConfigError

Batch = Mapping[str, Tensor]
Result = tuple[dict[str, Tensor], Any]


def training_step(training: Training, batch: Batch) -> Result:
    """Train the student on one batch; see ``optimiser_step``."""
    [result] = optimiser_step(training, [batch])
    return result


def optimiser_step(training: Training, batches: Sequence[Batch]) -> list[Result]:
    """Train the student on some batches, with one step of the optimiser.

    The gradient is the mean of the batches' gradients. With terms that are means over images and a
    student without batch statistics, it is that of one large batch.

    Args:
        training: the run; its objective's parameters and optimiser change in place.
        batches: one or more, with "image" (B, C, H, W) and the arrays of the task's targets.

    Returns:
        for each batch the unweighted loss terms and their weighted sum "total" (scalars), and the
        objective's output for the training meter, all detached.
    """
    training.optimizer.zero_grad(set_to_none=True)
    results = []
    for number, batch in enumerate(batches, start=1):
        with _gradients_of_all_ranks(training.parallel, wanted=number == len(batches)):
            terms, output = _forward(training, training.parallel, batch)
            total = training.objective.total(terms, training.progress)
            training.scaler.scale(total / len(batches)).backward()
        values = {name: term.detach() for name, term in terms.items()}
        results.append((values | {"total": total.detach()}, output))
    _update(training)
    return results


def _gradients_of_all_ranks(
    parallel: nn.Module, *, wanted: bool
) -> contextlib.AbstractContextManager[None]:
    """Let a backward pass average the gradients over ranks, or leave that to a later one."""
    if wanted or not isinstance(parallel, DistributedDataParallel):
        return contextlib.nullcontext()
    return parallel.no_sync()


def _update(training: Training) -> None:
    """Change the parameters by their gradients, and all that follows their steps."""
    if training.clip_norm is not None:
        training.scaler.unscale_(training.optimizer)
        clip_grad_norm_(training.objective.parameters(), training.clip_norm)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    training.schedule.step()
    if training.averaged is not None:
        training.averaged.update_parameters(training.objective.student)


def _forward(training: Training, model: nn.Module, batch: Batch) -> Result:
    images_BCHW, targets = training.to_device(batch)
    with training.autocast():
        teacher = None
        if training.teacher is not None:
            teacher_images_BCHW = training.teacher_normalise(images_BCHW)
            if training.lookup is not None:
                teacher = training.lookup(training.epoch, batch["row"], teacher_images_BCHW)
            else:
                teacher = training.teacher(teacher_images_BCHW)
            if training.objective.graph is not None:
                training.objective.graph.begin(teacher.features)
        return model(training.normalise(images_BCHW), targets, teacher)


def check_terms(training: Training, batch: Batch) -> dict[str, float]:
    """Return the ``gradient_norms`` of one batch, after checking that every term is effective.

    A term that is zero, not finite, or without a gradient in the student is a mistake in the set-up
    that would otherwise go unnoticed. A detector's own loss may be zero if no image has a box.
    Either all ranks raise or none does.

    Raises:
        ConfigError: a term fails the check; the message names it.
    """
    values, norms = gradient_norms(training, batch)
    labelled_ranks = all_sum(
        torch.tensor(float(not training.task.is_blank(batch)), device=training.device)
    )
    for name, norm in norms.items():
        value = values[name]
        is_effective = math.isfinite(value) and value != 0.0 and math.isfinite(norm) and norm > 0.0
        if not is_effective and not (name == "task" and value == 0.0 and labelled_ranks == 0.0):
            raise ConfigError(
                f"loss term '{name}' is {value:g} with a gradient of norm {norm:g} in the "
                "student at the first step, so the student cannot learn from it: check --levels, "
                "--dim and that the images differ, or set the term's weight to 0"
            )
    return norms


def measure_shares(training: Training, batch: Batch) -> None:
    """Update the gradient norms that scale shares of the labels' gradient, until they are fixed.

    A run whose weights are shares needs this once before its first ``training_step``; ``run_epoch``
    calls it. Every rank must call.
    """
    units = training.objective.units
    if units is not None and units.is_measuring:
        units.add(gradient_norms(training, batch)[1])


def gradient_norms(training: Training, batch: Batch) -> tuple[dict[str, float], dict[str, float]]:
    """Return the terms of one batch, and the norms of their gradients in the student's parameters.

    Terms and norms are unweighted. Each rank measures them on its own batch, and they are averaged
    over ranks, so they are equal on all ranks. Parameters, gradients and buffers do not change.
    """
    objective = training.objective
    buffers = {name: buffer.clone() for name, buffer in objective.named_buffers()}
    try:
        # a function compiled for a step allows one backward pass only
        with torch.compiler.set_stance("force_eager"), objective.separate_terms():
            terms, _ = _forward(training, objective, batch)
        values_and_norms = [
            [float(term.detach()), _gradient_norm(term, objective.student)]
            for term in terms.values()
        ]
    finally:
        with torch.no_grad():
            for name, buffer in objective.named_buffers():
                buffer.copy_(buffers[name])
    totals_T2 = torch.tensor(values_and_norms, dtype=torch.float64, device=training.device)
    means_T2 = all_sum(totals_T2) / all_sum(torch.ones_like(totals_T2))
    values_T, norms_T = means_T2.T.tolist()
    return dict(zip(terms, values_T, strict=True)), dict(zip(terms, norms_T, strict=True))


def _gradient_norm(term: Tensor, student: nn.Module) -> float:
    """Return the norm of a scalar's gradient with respect to the student's trainable parameters."""
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    squares = [gradient.float().square().sum() for gradient in gradients if gradient is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0
