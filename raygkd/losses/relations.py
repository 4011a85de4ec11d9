"""Distillation of the relations between predictions, across two views of each image: VRM.

Shape letters: B rows of logits, M rows of the first view, N rows of the second, K classes, P pairs
of classes, L entries of an edge.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from raygkd.graph import full_precision, require, weight_problems
from raygkd.losses.base import BaselineLoss, Setup
from raygkd.losses.logits import logits_problem, standardised
from raygkd.registry import METHODS, option

# smallest length that the difference of two predictions is divided by, in units of the standardised
# logits: two views with the same logits would have an arbitrary direction
SHORTEST = 0.1


@full_precision
def vrm_loss(
    student_logits_BK: Tensor,
    teacher_logits_BK: Tensor,
    samples: float,
    classes: float,
    pruned: float,
) -> Tensor:
    """Return the Huber loss of edges between images, and between classes, weighted and summed.

    The first half of the rows are predictions for images, the second half those for another view of
    the same images, in the same order; of an odd number of rows, the first half has one more. The
    logits of each row are standardised. The edge between row m of the first half and row n of the
    second is ``(z_m - z_n) / ||z_m - z_n||``, a vector over the classes; with columns w of the
    logits, the edge between two classes i < j is ``(w_i - w_j) / ||w_i - w_j||``, a vector over all
    rows. Lengths below 0.1 count as 0.1. The Huber loss (delta 1) between the edges of student and
    teacher is summed over their entries and averaged over edges.

    Edges between images are unreliable if the student's predictions disagree: those with the
    largest ``-sum_k (p_m log p_n + p_n log p_m)``, the cross-entropies of the class probabilities
    in both directions, are left out.

    Args:
        student_logits_BK: logits (B, K), K at least 2.
        teacher_logits_BK: logits (B, K); they get no gradient. The edges take memory of
            B^2 K / 4 and B K^2 / 2 numbers.
        samples: weight of the edges between images.
        classes: weight of the edges between classes.
        pruned: share of the edges between images to leave out, from 0 to below 1.

    Returns:
        A scalar without unit, 0 to 2 for each weight, in float32 (float64 for float64 logits) under
        autocast too. Without a second row there are no edges between images.

    Raises:
        ConfigError: the logits are not (B, K) of the same shape, there is one class only, a weight
            is negative, or both are 0.

    Source: Zhang et al., arXiv 2502.20760. The criterion of unreliable edges, their share, the
    smallest length and the reduction are [ours]; the authors' are unknown.
    """
    require(
        logits_problem(student_logits_BK, teacher_logits_BK, classes=2),
        *weight_problems(samples=samples, classes=classes),
    )
    student_BK = standardised(student_logits_BK)
    teacher_BK = standardised(teacher_logits_BK.detach())
    terms = []
    if samples:
        differences_MN = _huber(_between_views(student_BK), _between_views(teacher_BK))
        kept = _reliable(student_logits_BK.detach(), pruned)
        terms.append(samples * _mean(differences_MN.flatten()[kept]))
    if classes:
        differences_P = _huber(_between_classes(student_BK), _between_classes(teacher_BK))
        terms.append(classes * _mean(differences_P))
    return torch.stack(terms).sum()


def _halves(rows_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of the first view (M, K) and of the second (N, K)."""
    first = (len(rows_BK) + 1) // 2
    return rows_BK[:first], rows_BK[first:]


def _between_views(rows_BK: Tensor) -> Tensor:
    """Return the edges (M, N, K) between the rows of both views."""
    first_MK, second_NK = _halves(rows_BK)
    return F.normalize(first_MK[:, None] - second_NK, dim=-1, eps=SHORTEST)


def _between_classes(rows_BK: Tensor) -> Tensor:
    """Return the edges (P, B) between the columns."""
    columns_KB = rows_BK.mT
    first_P, second_P = torch.triu_indices(
        len(columns_KB), len(columns_KB), offset=1, device=rows_BK.device
    )
    return F.normalize(columns_KB[first_P] - columns_KB[second_P], dim=-1, eps=SHORTEST)


def _huber(student_L: Tensor, teacher_L: Tensor) -> Tensor:
    """Return the Huber loss of each edge, summed over its entries, which are the last axis."""
    return F.huber_loss(student_L, teacher_L, reduction="none").sum(-1)


def _mean(values: Tensor) -> Tensor:
    """Return the mean; 0 of no values."""
    return values.sum() / max(1, values.numel())


def _reliable(logits_BK: Tensor, pruned: float) -> Tensor:
    """Return the indices of the edges (M * N) on which both predictions agree best."""
    first_MK, second_NK = (half.log_softmax(1) for half in _halves(logits_BK))
    disagreement_MN = -(first_MK.exp() @ second_NK.mT + first_MK @ second_NK.exp().mT)
    edges = disagreement_MN.numel()
    return disagreement_MN.flatten().argsort(stable=True)[: edges - int(pruned * edges)]


@METHODS.register("vrm")
class VRM(BaselineLoss):
    """Relations between the predictions for images and for other views of them, see ``vrm_loss``.

    In training, each batch is followed by a second view of its images, changed by RandAugment, for
    teacher, student and the labels' loss alike.

    Args:
        setup: what it is built for.
        samples: weight of the edges between images.
        classes: weight of the edges between classes.
        pruned: share of the edges between images to leave out.

    Raises:
        ConfigError: a weight is negative, or both are 0.
    """

    weight = 1.0
    # the published weights are unknown
    baseline_share = 1.0
    two_views = True
    source = "Zhang et al., ICCV 2025, arXiv 2502.20760; weights and pruning are ours"

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        """Settings of the loss."""

        samples: float = option(1.0, "weight of the relations between images", minimum=0.0)
        classes: float = option(1.0, "weight of the relations between classes", minimum=0.0)
        pruned: float = option(
            0.1,
            "share of the relations between images to leave out: those on whose classes the "
            "student's predictions agree least",
            minimum=0.0,
            below=1.0,
        )

    needs = ("student_logits", "teacher_logits")

    def __init__(self, setup: Setup, *, samples: float, classes: float, pruned: float):
        super().__init__(setup)
        require(*weight_problems(samples=samples, classes=classes))
        self.samples, self.classes, self.pruned = samples, classes, pruned

    def loss(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Return ``vrm_loss``."""
        return vrm_loss(student_logits, teacher_logits, self.samples, self.classes, self.pruned)
