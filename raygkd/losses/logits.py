"""Distillation of logits.

Shape letters: B batch, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from raygkd.graph import (
    full_precision,
    require,
    shape_problem,
    temperature_problem,
    weight_problems,
)
from raygkd.losses.base import BaselineLoss, Setup


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


@full_precision
def dkd_loss(
    student_logits_BK: Tensor,
    teacher_logits_BK: Tensor,
    targets_B: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
) -> Tensor:
    """Return ``T^2 (alpha KL(b_t || b_s) + beta KL(q_t || q_s))``, averaged over the batch.

    b are the two probabilities of the target class and of all others together, q those of the
    other classes among themselves. With alpha = 1 and beta the teacher's probability that it is
    not the target, it would be ``kd_loss``.

    Args:
        student_logits_BK: logits (B, K), K at least 2.
        teacher_logits_BK: logits (B, K); they get no gradient.
        targets_B: class of each image (B,), int64.
        alpha: weight of the target class.
        beta: weight of the other classes.
        temperature: T > 0, which divides the logits.

    Returns:
        A scalar in nats times T^2, in float32 (float64 for float64 logits) under autocast too.

    Raises:
        ConfigError: the shapes differ, or the temperature is not above 0.

    Source: Zhao et al., arXiv 2203.08679.
    """
    require(
        shape_problem("logits", student_logits_BK, teacher_logits_BK),
        temperature_problem(temperature),
    )
    target_s, others_s = _decoupled(student_logits_BK / temperature, targets_B)
    target_t, others_t = _decoupled(teacher_logits_BK.detach() / temperature, targets_B)
    of_target = F.kl_div(target_s, target_t, reduction="batchmean", log_target=True)
    of_others = F.kl_div(others_s, others_t, reduction="batchmean", log_target=True)
    return temperature**2 * (alpha * of_target + beta * of_others)


def _decoupled(logits_BK: Tensor, targets_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return log probabilities of target and rest (B, 2), and of the rest by itself (B, K - 1)."""
    log_BK = logits_BK.log_softmax(1)
    is_target_BK = torch.zeros_like(log_BK, dtype=torch.bool).scatter(1, targets_B[:, None], True)
    rest_BJ = log_BK[~is_target_BK].unflatten(0, (len(log_BK), -1))
    whole_rest_B1 = rest_BJ.logsumexp(1, keepdim=True)
    return torch.cat([log_BK[is_target_BK][:, None], whole_rest_B1], 1), rest_BJ - whole_rest_B1


class KD(BaselineLoss):
    """Distillation of softened class probabilities, see ``kd_loss``.

    Raises:
        ConfigError: the temperature is not above 0.
    """

    needs = ("student_logits", "teacher_logits")

    def __init__(self, setup: Setup, *, temperature: float):
        super().__init__(setup)
        require(temperature_problem(temperature))
        self.temperature = temperature

    def loss(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Return ``kd_loss``."""
        return kd_loss(student_logits, teacher_logits, self.temperature)


class DKD(BaselineLoss):
    """Target class and other classes decoupled, see ``dkd_loss``.

    Raises:
        ConfigError: a weight is negative, both are 0, or the temperature is not above 0.
    """

    needs = ("student_logits", "teacher_logits", "targets")

    def __init__(self, setup: Setup, *, alpha: float, beta: float, temperature: float):
        super().__init__(setup)
        require(temperature_problem(temperature), *weight_problems(alpha=alpha, beta=beta))
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def loss(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        """Return ``dkd_loss``."""
        return dkd_loss(
            student_logits, teacher_logits, targets, self.alpha, self.beta, self.temperature
        )
