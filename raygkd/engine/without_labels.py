"""Training on images without labels: there is nothing to compare a student with but its teacher.

Shapes: B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from raygkd.engine.distributed import all_sum
from raygkd.engine.pooled_features import pooled_features
from raygkd.engine.tasks import Batch, ImageMeter, Inputs, TrainingMeter, pixels
from raygkd.metrics.similarity import LinearCKA


@dataclass(frozen=True, eq=False)
class WithoutLabels:
    """Images of no known class; a student is scored by how alike it and its teacher are.

    Attributes:
        teacher: the frozen teacher, in eval mode.
        teacher_inputs: images as float (B, 3, H, W) in 0..1 -> the teacher's input.
        measure: the score: "cka", of their pooled features, or "agreement", the share of the images
            of which both say the same class.
        compares_classes: whether the student's classes are the teacher's and it learns them.
    """

    lead_score: ClassVar[str] = "cka"
    teacher: nn.Module
    teacher_inputs: Callable[[Tensor], Tensor]
    measure: str
    compares_classes: bool

    def targets(self, batch: Batch, device: torch.device) -> Tensor:
        """Return the labels (B,), which all say that there is none."""
        return batch["label"].to(device, non_blocking=True)

    def is_blank(self, batch: Batch) -> bool:
        """Return True: no image has a label."""
        return True

    def meter(self, device: torch.device) -> TrainingMeter:
        """Return a meter that counts the images."""
        return ImageMeter(device)

    @torch.no_grad()
    def score(
        self, model: nn.Module, batches: Iterable[Batch], inputs: Inputs, *, by_image: bool = False
    ) -> dict[str, Any]:
        """Return "score" and "cka", where classes are compared "agreement", each from 0 to 1."""
        device = next(model.parameters()).device
        alike: LinearCKA | None = None
        agreed = torch.zeros(2, dtype=torch.float64, device=device)
        with pooled_features(model) as student, pooled_features(self.teacher) as teacher:
            for batch in batches:
                own, features_BC = student(inputs(batch))
                given, of_teacher_BC = teacher(self.teacher_inputs(pixels(batch, device)))
                if alike is None:
                    sizes = features_BC.shape[1], of_teacher_BC.shape[1]
                    alike = LinearCKA(sizes, device)
                alike.update(features_BC, of_teacher_BC)
                if self.compares_classes:
                    same = (own.argmax(1) == given.argmax(1)).sum()
                    agreed += torch.stack([same, same.new_tensor(len(own))])
        assert alike is not None
        alike.reduce(all_sum)
        same, count = all_sum(agreed).tolist()
        scores = {"cka": alike.compute()}
        scores |= {"agreement": same / count} if self.compares_classes else {}
        return {"score": scores[self.measure], **scores}
