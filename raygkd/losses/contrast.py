"""Contrastive distillation: an image's embedding in the student finds its own in the teacher.

Shape letters: B batch, C channels, H height, W width, E entries of an embedding, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raygkd.graph import full_precision, require, shape_problem, temperature_problem
from raygkd.losses.base import FeatureLoss, Setup
from raygkd.registry import METHODS, option


@full_precision
def crd_loss(
    student_BE: Tensor,
    teacher_BE: Tensor,
    labels_B: Tensor,
    temperature: float,
    log_scale: Tensor | None = None,
) -> Tensor:
    """Return the noise-contrastive loss of embeddings, with the batch's other classes as noise.

    With the critic ``e_ij = exp(s_i . t_j / T)`` of unit embeddings, and m_i images of another
    class than i, the probability that i and j are one image is ``h = e_ij / (e_ij + m_i z)``. The
    loss is ``-log h_ii - sum_j log(1 - h_ij)`` over those j, averaged over i, plus the same with
    the roles of student and teacher exchanged.

    The authors draw the noise from a memory of all training images, and z is the mean of e over
    their first batch. A batch as noise needs the z of that batch: with the first one's, embeddings
    that move together change every h, and training diverged.

    Args:
        student_BE: embeddings (B, E).
        teacher_BE: embeddings (B, E).
        labels_B: class of each image (B,), int64.
        temperature: T > 0.
        log_scale: log z (scalar); None for the mean of e over the compared pairs, as a constant.

    Returns:
        A scalar in nats.

    Raises:
        ConfigError: the shapes differ, or the temperature is not above 0.

    Source: Tian et al., arXiv 1910.10699.
    """
    require(shape_problem("embeddings", student_BE, teacher_BE), temperature_problem(temperature))
    scores_BB = F.normalize(student_BE) @ F.normalize(teacher_BE).mT / temperature
    noise_BB = labels_B[:, None] != labels_B
    if log_scale is None:
        same_BB = torch.eye(len(labels_B), dtype=torch.bool, device=labels_B.device)
        compared = scores_BB.detach()[noise_BB | same_BB]
        log_scale = compared.logsumexp(0) - math.log(len(compared))
    log_noise_B1 = noise_BB.to(scores_BB.dtype).sum(1, keepdim=True).log() + log_scale
    total = scores_BB.new_zeros(())
    for anchored_BB in (scores_BB, scores_BB.mT):
        odds_BB = anchored_BB - log_noise_B1
        found_B = F.softplus(-odds_BB.diagonal())
        kept_B = F.softplus(odds_BB).masked_fill(~noise_BB, 0.0).sum(1)
        total = total + (found_B + kept_B).mean()
    return total


@METHODS.register("crd")
class CRD(FeatureLoss):
    """Embeddings of an image in both models against those of the batch, see ``crd_loss``.

    The embeddings are linear functions of the maps' means over their positions; both are trained
    with the student. A mixed image has the class of its largest share.

    Args:
        setup: what it is built for; it needs the shapes.
        temperature: of the critic.
        dim: entries of an embedding.

    Raises:
        ConfigError: the shapes are missing, or the temperature is not above 0.
    """

    weight = 0.8
    levels = "last"
    source = "Tian et al., ICLR 2020, arXiv 1910.10699"

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        """Settings of the loss."""

        temperature: float = option(0.07, "temperature of the similarities", above=0.0)
        dim: int = option(128, "dimension of the embeddings", minimum=1)

    needs = ("student_features", "teacher_features", "targets")

    def __init__(self, setup: Setup, *, temperature: float, dim: int):
        super().__init__(setup)
        require(temperature_problem(temperature))
        self.require_shapes("each level has embeddings of its own")
        self.temperature = temperature
        self.student_embeddings, self.teacher_embeddings = (
            nn.ModuleDict(
                {
                    str(level): nn.Linear(shapes[level][0], dim)
                    for level in self._levels(self.student_shapes)
                }
            )
            for shapes in (self.student_shapes, self.teacher_shapes)
        )

    def level_loss(
        self, level: int, student_BCHW: Tensor, teacher_BCHW: Tensor, targets: Tensor
    ) -> Tensor:
        """Return ``crd_loss`` of the embeddings."""
        self.require_pairs(student_BCHW)
        student_BE = self.student_embeddings[str(level)](student_BCHW.mean((2, 3)))
        teacher_BE = self.teacher_embeddings[str(level)](teacher_BCHW.mean((2, 3)))
        labels_B = targets if targets.ndim == 1 else targets.argmax(1)
        return crd_loss(student_BE, teacher_BE, labels_B, self.temperature)
