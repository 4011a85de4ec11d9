"""Distillation of logits.

Shape letters: B batch, K classes, R rows, N entries of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from raygkd.graph import (
    centred,
    full_precision,
    require,
    shape_problem,
    temperature_problem,
    weight_problems,
)
from raygkd.losses.base import BaselineLoss, Setup
from raygkd.registry import METHODS, option

# added to the standard deviation of logits, in units of the logits
DEVIATION = 1e-7
# smallest norm that a correlation divides by
SMALLEST_NORM = 1e-8


@full_precision
def kd_loss(student_logits_BK: Tensor, teacher_logits_BK: Tensor, temperature: float) -> Tensor:
    """Return ``T^2 KL(p_t || p_s)`` of the softened class probabilities, averaged over the batch.

    Args:
        student_logits_BK: logits (B, K).
        teacher_logits_BK: logits (B, K); they get no gradient.
        temperature: T > 0, which divides the logits; T^2 restores the scale of the gradient.

    Returns:
        A scalar in nats times T^2, in float32 (float64 for float64 logits) under autocast too.

    Raises:
        ConfigError: the logits are not (B, K) of the same shape, or the temperature is not above 0.

    Source: Hinton et al., arXiv 1503.02531.
    """
    require(
        logits_problem(student_logits_BK, teacher_logits_BK),
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
    targets: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
) -> Tensor:
    """Return ``T^2 (alpha KL(b_t || b_s) + beta KL(q_t || q_s))``, averaged over the batch.

    b are the two probabilities of the target class and of all other classes together; q are the
    probabilities among the other classes. With alpha = 1, and beta equal to the teacher's
    probability of the other classes, it would be ``kd_loss``.

    Args:
        student_logits_BK: logits (B, K), K at least 2.
        teacher_logits_BK: logits (B, K); they get no gradient.
        targets: class of each image (B,), int64; or the shares of the classes (B, K) of mixed
            images, of which the two largest count: the loss is the mean over both classes,
            weighted by their shares.
        alpha: weight of the target class.
        beta: weight of the other classes.
        temperature: T > 0, which divides the logits.

    Returns:
        A scalar in nats times T^2, in float32 (float64 for float64 logits) under autocast too.

    Raises:
        ConfigError: the logits are not (B, K) of the same shape, there is one class only, or the
            temperature is not above 0.

    Source: Zhao et al., arXiv 2203.08679.
    """
    require(
        logits_problem(student_logits_BK, teacher_logits_BK, classes=2),
        temperature_problem(temperature),
    )
    student_BK = student_logits_BK / temperature
    teacher_BK = teacher_logits_BK.detach() / temperature
    weights = alpha, beta
    if targets.ndim == 1:
        mean = _decoupled_divergences(student_BK, teacher_BK, targets, *weights).mean()
    else:
        shares_B2, classes_B2 = targets.topk(2, dim=1)
        divergences = [
            _decoupled_divergences(student_BK, teacher_BK, classes_B, *weights)
            for classes_B in classes_B2.unbind(1)
        ]
        mean = (shares_B2 * torch.stack(divergences, 1)).sum(1).mean()
    return temperature**2 * mean


def _decoupled_divergences(
    student_BK: Tensor, teacher_BK: Tensor, targets_B: Tensor, alpha: float, beta: float
) -> Tensor:
    """Return the weighted sum of both divergences of each sample (B,)."""
    target_s, others_s = _decoupled(student_BK, targets_B)
    target_t, others_t = _decoupled(teacher_BK, targets_B)
    target_B = F.kl_div(target_s, target_t, reduction="none", log_target=True).sum(1)
    others_B = F.kl_div(others_s, others_t, reduction="none", log_target=True).sum(1)
    return alpha * target_B + beta * others_B


def _decoupled(logits_BK: Tensor, targets_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return log probabilities of target and non-target (B, 2), and among the latter (B, K - 1)."""
    log_BK = logits_BK.log_softmax(1)
    is_target_BK = torch.zeros_like(log_BK, dtype=torch.bool).scatter(1, targets_B[:, None], True)
    others_BJ = log_BK[~is_target_BK].unflatten(0, (len(log_BK), -1))
    sum_B1 = others_BJ.logsumexp(1, keepdim=True)
    return torch.cat([log_BK[is_target_BK][:, None], sum_B1], 1), others_BJ - sum_B1


@full_precision
def standardised_kd_loss(
    student_logits_BK: Tensor, teacher_logits_BK: Tensor, temperature: float
) -> Tensor:
    """Return ``kd_loss`` of logits that are standardised per sample.

    Each sample's mean over the classes is subtracted from its logits, and the result is divided by
    its standard deviation (with K - 1, as in the authors' code) plus 1e-7. Logits that are all
    equal up to rounding become zero and have no gradient.

    Args:
        student_logits_BK: logits (B, K), K at least 2.
        teacher_logits_BK: logits (B, K); they get no gradient.
        temperature: T > 0, which divides the standardised logits.

    Returns:
        A scalar in nats times T^2, in float32 (float64 for float64 logits) under autocast too.

    Raises:
        ConfigError: the logits are not (B, K) of the same shape, there is one class only, or the
            temperature is not above 0.

    Source: Sun et al., arXiv 2403.01427.
    """
    require(
        logits_problem(student_logits_BK, teacher_logits_BK, classes=2),
        temperature_problem(temperature),
    )
    student_BK = standardised(student_logits_BK)
    teacher_BK = standardised(teacher_logits_BK.detach())
    return kd_loss(student_BK, teacher_BK, temperature)


def standardised(logits_BK: Tensor) -> Tensor:
    """Subtract each row's mean and divide by its standard deviation."""
    centred_BK = _centred_rows(logits_BK)
    return centred_BK / (centred_BK.std(1, keepdim=True) + DEVIATION)


@full_precision
def dist_loss(
    student_logits_BK: Tensor, teacher_logits_BK: Tensor, beta: float, gamma: float, tau: float
) -> Tensor:
    """Return ``tau^2 (beta (1 - r_b) + gamma (1 - r_w))`` of two mean Pearson correlations.

    They are correlations between the class probabilities of student and teacher: r_b over the
    classes of an image, averaged over images, and r_w over the images for a class, averaged over
    classes. Values that are constant up to rounding have correlation 0 and no gradient.

    Args:
        student_logits_BK: logits (B, K).
        teacher_logits_BK: logits (B, K); they get no gradient.
        beta: weight of the inter-class relation.
        gamma: weight of the intra-class relation.
        tau: temperature, above 0, which divides the logits.

    Returns:
        A scalar without unit, in float32 (float64 for float64 logits) under autocast too.

    Raises:
        ConfigError: the logits are not (B, K) of the same shape, a weight is negative, both are 0,
            or tau is not above 0.

    Source: Huang et al., arXiv 2205.10536.
    """
    require(
        logits_problem(student_logits_BK, teacher_logits_BK),
        temperature_problem(tau, "tau"),
        *weight_problems(beta=beta, gamma=gamma),
    )
    student_BK = (student_logits_BK / tau).softmax(1)
    teacher_BK = (teacher_logits_BK.detach() / tau).softmax(1)
    between = 1 - _correlations(student_BK, teacher_BK).mean()
    within = 1 - _correlations(student_BK.mT, teacher_BK.mT).mean()
    return tau**2 * (beta * between + gamma * within)


def _correlations(student_RN: Tensor, teacher_RN: Tensor) -> Tensor:
    """Return the Pearson correlation between corresponding rows (R,)."""
    rows = _centred_rows(student_RN), _centred_rows(teacher_RN)
    return F.cosine_similarity(*rows, dim=1, eps=SMALLEST_NORM)


def _centred_rows(values_RN: Tensor) -> Tensor:
    """Subtract each row's mean; a constant row becomes zero, and so does its gradient."""
    return centred(values_RN[None, ..., None])[0, ..., 0]


def logits_problem(student_BK: Tensor, teacher_BK: Tensor, classes: int = 1) -> str | None:
    """Return a problem if logits are not (B, K) of the same shape, or there are too few classes."""
    shape = tuple(student_BK.shape)
    if len(shape) != 2 or shape[0] < 1 or shape[1] < classes:
        return (
            "logits must have two dimensions (B, K), with B at least 1 and"
            f" K at least {classes}; got {shape}"
        )
    return shape_problem("logits", student_BK, teacher_BK)


@METHODS.register("kd")
class KD(BaselineLoss):
    """Distillation of softened class probabilities, see ``kd_loss``.

    Raises:
        ConfigError: the temperature is not above 0.
    """

    weight = 0.9
    task_weight = 0.1
    source = "Hinton et al., arXiv 1503.02531"

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        """Settings of the loss."""

        temperature: float = option(4.0, "temperature of the logits", above=0.0)

    needs = ("student_logits", "teacher_logits")

    def __init__(self, setup: Setup, *, temperature: float):
        super().__init__(setup)
        require(temperature_problem(temperature))
        self.temperature = temperature

    def loss(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Return ``kd_loss``."""
        return kd_loss(student_logits, teacher_logits, self.temperature)


@METHODS.register("dkd")
class DKD(BaselineLoss):
    """Target class and other classes decoupled, see ``dkd_loss``.

    Raises:
        ConfigError: a weight is negative, both are 0, or the temperature is not above 0.
    """

    weight = 1.0
    ramp = 20 / 240
    source = "Zhao et al., CVPR 2022, arXiv 2203.08679; constants of its mdistiller repository"

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        """Settings of the loss."""

        alpha: float = option(1.0, "weight of the target-class term", minimum=0.0)
        beta: float = option(8.0, "weight of the non-target-class term", minimum=0.0)
        temperature: float = option(4.0, "temperature of the logits", above=0.0)

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


@METHODS.register("logit-std")
class StandardisedKD(KD):
    """Distillation of standardised logits, see ``standardised_kd_loss``.

    Raises:
        ConfigError: the temperature is not above 0.
    """

    weight = 9.0
    source = "Sun et al., CVPR 2024, arXiv 2403.01427; constants of its repository"

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        """Settings of the loss."""

        temperature: float = option(2.0, "temperature of the standardised logits", above=0.0)

    def loss(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Return ``standardised_kd_loss``."""
        return standardised_kd_loss(student_logits, teacher_logits, self.temperature)


@METHODS.register("dist")
class DIST(BaselineLoss):
    """Correlations of the predictions, see ``dist_loss``.

    Args:
        setup: what it is built for.
        beta: weight of the inter-class relation.
        gamma: weight of the intra-class relation.
        tau: temperature of the logits.

    Raises:
        ConfigError: a weight is negative, both are 0, or tau is not above 0.
    """

    weight = 1.0
    source = "Huang et al., NeurIPS 2022, arXiv 2205.10536; defaults of its code"

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        """Settings of the loss."""

        beta: float = option(
            1.0, "weight of the relation between the classes of an image", minimum=0.0
        )
        gamma: float = option(
            1.0, "weight of the relation between the images of a class", minimum=0.0
        )
        tau: float = option(1.0, "temperature of the logits", above=0.0)

    needs = ("student_logits", "teacher_logits")

    def __init__(self, setup: Setup, *, beta: float, gamma: float, tau: float):
        super().__init__(setup)
        require(temperature_problem(tau, "tau"), *weight_problems(beta=beta, gamma=gamma))
        self.beta, self.gamma, self.tau = beta, gamma, tau

    def loss(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Return ``dist_loss``."""
        return dist_loss(student_logits, teacher_logits, self.beta, self.gamma, self.tau)
