"""One optimiser step, and the check before the first that every loss term reaches the student.

Shapes: B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from raygkd.errors import ConfigError

if TYPE_CHECKING:
    from raygkd.engine.loop import Training


def training_step(
    training: Training, batch: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    """Change the student by one batch.

    Args:
        training: the run; its objective's parameters and optimiser change in place.
        batch: "image" uint8 (B, C, H, W) and "label" int64 (B,).

    Returns:
        The unweighted loss terms and their weighted sum "total" (scalars), and the logits (B, K),
        all detached.
    """
    terms, logits_BK = _forward(training, training.parallel, batch)
    training.optimizer.zero_grad(set_to_none=True)
    total = training.objective.total(terms)
    training.scaler.scale(total).backward()
    if training.clip_norm is not None:
        training.scaler.unscale_(training.optimizer)
        clip_grad_norm_(training.objective.parameters(), training.clip_norm)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    training.schedule.step()
    values = {name: term.detach() for name, term in terms.items()}
    return values | {"total": total.detach()}, logits_BK.detach()


def _forward(
    training: Training, model: nn.Module, batch: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    images_BCHW, labels_B = training.to_device(batch)
    with training.autocast():
        teacher = None
        if training.teacher is not None:
            teacher = training.teacher(training.teacher_normalise(images_BCHW))
        return model(training.normalise(images_BCHW), labels_B, teacher)


def check_terms(training: Training, batch: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the norm of each term's gradient in the student's parameters, on one batch.

    A term that is zero, not finite, or does not move the student is a mistake in the set-up that
    would otherwise pass in silence.

    Raises:
        ConfigError: such a term, by name.
    """
    objective = training.objective
    buffers = {name: buffer.clone() for name, buffer in objective.named_buffers()}
    terms, _ = _forward(training, objective, batch)
    norms = {}
    parameters = [p for p in objective.student.parameters() if p.requires_grad]
    for name, term in terms.items():
        gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        squares = [
            gradient.float().square().sum() for gradient in gradients if gradient is not None
        ]
        norms[name] = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
        value = float(term.detach())
        if value == 0.0 or not norms[name] > 0.0 or not norms[name] < float("inf"):
            raise ConfigError(
                f"loss term '{name}' is {value:g} with a gradient of norm {norms[name]:g} in the "
                "student at the first step, so it cannot teach it: check --levels, --dim and that "
                "the images differ, or set the term's weight to 0"
            )
    with torch.no_grad():
        for name, buffer in objective.named_buffers():
            buffer.copy_(buffers[name])
    return norms
