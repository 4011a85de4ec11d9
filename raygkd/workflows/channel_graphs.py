"""Feature maps of teacher and student as the graph losses compare them.

Shapes: B images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from raygkd.assembly.matched_levels import matched_levels
from raygkd.assembly.models import input_spec
from raygkd.assembly.student_objective import build_objective
from raygkd.assembly.training import normaliser
from raygkd.config import Config
from raygkd.data.spec import ImageSpec
from raygkd.engine import Teacher
from raygkd.losses import GraphDistillationLoss
from raygkd.models import ModelFile, build_from_file, model_input

CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class MatchedMaps:
    """Maps (B, C, H, W) of one level, on one grid and with the teacher's channels.

    Attributes:
        teacher_BCHW: the teacher's.
        before_BCHW: the student's before its training, behind the adapter as it starts.
        after_BCHW: the student's after its training, behind the trained adapter.
    """

    teacher_BCHW: Tensor
    before_BCHW: Tensor
    after_BCHW: Tensor


@torch.no_grad()
def matched_maps(
    config: Config,
    spec: ImageSpec,
    teacher_file: ModelFile,
    checkpoint: Mapping[str, Any],
    pixels_BCHW: Tensor,
) -> dict[int, MatchedMaps]:
    """Return the maps of every level that a run has matched.

    Args:
        config: of the student's training, with a graph loss.
        spec: of the run's images.
        teacher_file: the teacher.
        checkpoint: the last one of the training.
        pixels_BCHW: images in 0..1.
    """
    teacher = build_from_file(teacher_file)
    objective = build_objective(config, spec, teacher)
    loss, student = objective.graph, objective.student
    assert loss is not None
    pairs = matched_levels(config, teacher, student, spec).pairs
    of_teacher, of_student = (
        model_input(name).interpolation for name in (teacher_file.name, config.model.student)
    )
    teacher_size = spec.of_teacher().image_size
    seen_BCHW = normaliser(teacher_file.mean, teacher_file.std, CPU, teacher_size, of_teacher)(
        pixels_BCHW
    )
    own = input_spec(config.model.student, spec)
    own_BCHW = normaliser(own.mean, own.std, CPU, spec.image_size, of_student)(pixels_BCHW)
    features: Mapping[int, Any] = Teacher(teacher, pairs)(seen_BCHW).features
    listen = Teacher(student, {level: level for level in pairs})
    _take_statistics_of_the_batch(student)
    before = _compared(loss, listen(own_BCHW).features)
    student.load_state_dict(checkpoint["student"])
    loss.load_state_dict(checkpoint["adapters"])
    objective.eval()
    after = _compared(loss, listen(own_BCHW).features)
    return {
        level: MatchedMaps(
            loss.teacher_graph(level, features[level]).maps_BCHW, before[level], after[level]
        )
        for level in pairs
    }


def _compared(loss: GraphDistillationLoss, features: Mapping[int, Any]) -> dict[int, Tensor]:
    return {level: loss.student_maps(level, maps) for level, maps in features.items()}


def _take_statistics_of_the_batch(model: nn.Module) -> None:
    """Let batch normalisation that has no statistics yet use those of the batch, as in training."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train()
