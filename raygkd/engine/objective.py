"""The student with its losses, and the teacher they listen to.

Shapes: B batch, C channels, H height, W width, K classes, M boxes of an image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raygkd.losses import GraphDistillationLoss, TeacherGraph, kd_loss
from raygkd.models import Detector, FeatureTap


@dataclass(frozen=True)
class TeacherOutput:
    """What the teacher says of one batch, without gradient.

    Attributes:
        features: level -> feature map (B, C, H, W), or the graph that the losses take.
        logits_BK: class scores; None of a detector.
    """

    features: Mapping[int, Tensor] | Mapping[int, TeacherGraph]
    logits_BK: Tensor | None = None


class Teacher:
    """A frozen model. It is no part of the Objective, so DDP, optimiser and checkpoint miss it.

    Args:
        model: a classifier or detector; it is put into eval mode and its parameters stop taking
            gradients.
        levels: the levels whose feature maps are wanted.
    """

    def __init__(self, model: nn.Module, levels: Sequence[int]):
        self.model = model.eval().requires_grad_(False)
        self._tap = FeatureTap(model, levels)

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor) -> TeacherOutput:
        """Return features, and a classifier's logits, of normalised images."""
        if isinstance(self.model, Detector):
            # its heads have nothing to say to the student
            features = self.model.features(images_BCHW)
            return TeacherOutput({level: features[level] for level in self._tap.levels})
        logits_BK, features = self._tap(images_BCHW)
        return TeacherOutput(features, logits_BK)


class Objective(nn.Module, ABC):
    """Student, adapters and loss terms in one module, so that DDP sees one forward pass.

    Args:
        student: the model that learns.
        levels: its levels that the graph loss reads.
        graph: the graph loss with its adapters, or None.
        kd_weight: share w of logit distillation in (1-w) task + w KD; 0 leaves it out.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        levels: Sequence[int] = (),
        graph: GraphDistillationLoss | None = None,
        kd_weight: float = 0.0,
    ):
        super().__init__()
        self.student = student
        self.graph = graph
        self.term_weights: dict[str, float] = {"task": 1.0 - kd_weight, "kd": kd_weight}
        if graph is not None:
            self.term_weights |= graph.term_weights
        # at w = 1 the labels say nothing, and a term of weight 0 is left out
        self.term_weights = {name: w for name, w in self.term_weights.items() if w}
        self._tap = FeatureTap(student, levels)

    @abstractmethod
    def forward(
        self, images_BCHW: Tensor, targets: Any, teacher: TeacherOutput | None
    ) -> tuple[dict[str, Tensor], Any]:
        """Return the unweighted loss terms of a batch (scalars), and what the task's meter takes.

        Args:
            images_BCHW: normalised images.
            targets: what ``Task.targets`` gives.
            teacher: what the teacher says of the same images, where the method needs it.
        """

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of the terms: L_task + alpha L_V + beta L_E + gamma L_S."""
        return torch.stack([self.term_weights[name] * term for name, term in terms.items()]).sum()


class ClassifierObjective(Objective):
    """Cross-entropy, logit distillation and the graph loss of a classifier.

    Args:
        kd_temperature: temperature of the logits.
        others: see ``Objective``.
    """

    def __init__(self, student: nn.Module, *, kd_temperature: float = 4.0, **others: Any):
        super().__init__(student, **others)
        self.kd_temperature = kd_temperature

    def forward(
        self, images_BCHW: Tensor, targets: Tensor, teacher: TeacherOutput | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the unweighted loss terms of a batch (scalars) and the student's logits (B, K)."""
        logits_BK, features = self._tap(images_BCHW)
        terms: dict[str, Tensor] = {}
        if "task" in self.term_weights:
            terms["task"] = F.cross_entropy(logits_BK.float(), targets)
        if "kd" in self.term_weights and teacher is not None:
            assert teacher.logits_BK is not None
            terms["kd"] = kd_loss(logits_BK, teacher.logits_BK, self.kd_temperature)
        if self.graph is not None and teacher is not None:
            terms |= self.graph(features, teacher.features)
        return terms, logits_BK.detach()


class DetectorObjective(Objective):
    """A detector's own losses, summed, and the graph loss of its pyramid."""

    def forward(
        self,
        images_BCHW: Tensor,
        targets: Sequence[Mapping[str, Tensor]],
        teacher: TeacherOutput | None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the unweighted loss terms of a batch, and the parts of the task's (scalars)."""
        parts, features = self._tap(images_BCHW, targets)
        terms = {"task": torch.stack([part.float() for part in parts.values()]).sum()}
        if self.graph is not None and teacher is not None:
            boxes = [target["boxes"] for target in targets]
            terms |= self.graph(features, teacher.features, boxes)
        return terms, {name: part.detach() for name, part in parts.items()}
