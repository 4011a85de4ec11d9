"""The learning rate over the steps of a run."""

from __future__ import annotations

import math

from raygkd.config import OptimConfig


def lr_factor(step: int, steps_per_epoch: int, optim: OptimConfig) -> float:
    """Return the learning rate of a step as a share of ``--lr``.

    It rises linearly over the warm-up, then falls: "cosine" to 0 at the last step's end,
    "multistep" by ``--lr-decay`` after each milestone, "constant" not at all.

    Args:
        step: optimiser steps done before this one.
        steps_per_epoch: optimiser steps in an epoch.
        optim: the schedule.
    """
    total = optim.epochs * steps_per_epoch
    warmup = int(optim.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / warmup
    if optim.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
    if optim.schedule == "multistep":
        return optim.lr_decay ** sum(step >= milestone * total for milestone in optim.milestones)
    return 1.0
