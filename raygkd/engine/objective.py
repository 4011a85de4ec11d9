"""The student with its losses, and the teacher they listen to.

Shapes: B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raygkd.losses import GraphDistillationLoss, kd_loss
from raygkd.models import FeatureTap


@dataclass(frozen=True)
class TeacherOutput:
    """What the teacher says of one batch, without gradient.

    Attributes:
        logits_BK: class scores.
        features: level -> feature map (B, C, H, W).
    """

    logits_BK: Tensor
    features: dict[int, Tensor]


class Teacher:
    """A frozen model. It is no part of the Objective, so DDP, optimiser and checkpoint miss it.

    Args:
        model: a classifier; it is put into eval mode and its parameters stop taking gradients.
        levels: the stages whose feature maps are wanted.
    """

    def __init__(self, model: nn.Module, levels: Sequence[int]):
        self.model = model.eval().requires_grad_(False)
        self._tap = FeatureTap(model, levels)

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor) -> TeacherOutput:
        """Return logits and features of normalised images."""
        logits_BK, features = self._tap(images_BCHW)
        return TeacherOutput(logits_BK, features)


class Objective(nn.Module):
    """Student, adapters and loss terms in one module, so that DDP sees one forward pass.

    Args:
        student: the classifier that learns.
        levels: its stages that the graph loss reads.
        graph: the graph loss with its adapters, or None.
        kd_weight: share w of logit distillation in (1-w) CE + w KD; 0 leaves it out.
        kd_temperature: temperature of the logits.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        levels: Sequence[int] = (),
        graph: GraphDistillationLoss | None = None,
        kd_weight: float = 0.0,
        kd_temperature: float = 4.0,
    ):
        super().__init__()
        self.student = student
        self.graph = graph
        self.kd_temperature = kd_temperature
        self.term_weights: dict[str, float] = {"task": 1.0 - kd_weight}
        if kd_weight:
            self.term_weights["kd"] = kd_weight
        if graph is not None:
            self.term_weights |= graph.term_weights
        # at w = 1 the labels say nothing, and a term of weight 0 is left out
        self.term_weights = {name: w for name, w in self.term_weights.items() if w}
        self._tap = FeatureTap(student, levels)

    def forward(
        self, images_BCHW: Tensor, labels_B: Tensor, teacher: TeacherOutput | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the unweighted loss terms of a batch (scalars) and the student's logits (B, K)."""
        logits_BK, features = self._tap(images_BCHW)
        terms: dict[str, Tensor] = {}
        if "task" in self.term_weights:
            terms["task"] = F.cross_entropy(logits_BK.float(), labels_B)
        if "kd" in self.term_weights and teacher is not None:
            terms["kd"] = kd_loss(logits_BK, teacher.logits_BK, self.kd_temperature)
        if self.graph is not None and teacher is not None:
            terms |= self.graph(features, teacher.features)
        return terms, logits_BK

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of the terms: L_task + alpha L_V + beta L_E + gamma L_S."""
        return torch.stack([self.term_weights[name] * term for name, term in terms.items()]).sum()
