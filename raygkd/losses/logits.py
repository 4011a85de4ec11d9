"""Distillation of logits.

Shape letters: B batch, K classes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from raygkd.graph import full_precision, require, shape_problem, temperature_problem


@full_precision
def kd_loss(student_logits_BK: Tensor, teacher_logits_BK: Tensor, temperature: float) -> Tensor:
    """Return ``T^2 KL(p_t || p_s)`` of the softened class probabilities, averaged over the batch.

    Args:
        student_logits_BK: logits (B, K).
        teacher_logits_BK: logits (B, K); they get no gradient.
        temperature: T > 0, which divides the logits; T^2 keeps the gradient's size.

    Returns:
        A scalar in nats times T^2, in float32 (float64 for float64 logits) under autocast too.

    Raises:
        ConfigError: the shapes differ, or the temperature is not above 0.

    Source: Hinton et al., arXiv 1503.02531.
    """
    require(
        shape_problem("logits", student_logits_BK, teacher_logits_BK),
        temperature_problem(temperature),
    )
    student_BK = (student_logits_BK / temperature).log_softmax(1)
    teacher_BK = (teacher_logits_BK.detach() / temperature).log_softmax(1)
    divergence = F.kl_div(student_BK, teacher_BK, reduction="batchmean", log_target=True)
    return temperature**2 * divergence
