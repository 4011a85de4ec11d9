"""Masked generative distillation of a detector's feature pyramid.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from raygkd.graph import full_precision, require, shape_problem
from raygkd.losses.base import Setup
from raygkd.losses.pyramids import PyramidLoss
from raygkd.registry import METHODS, option


@full_precision
def generation_loss(generated_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    """Return the summed squared difference of two maps, averaged over samples.

    Args:
        generated_BCHW: feature maps (B, C, H, W), already of the teacher's shape.
        teacher_BCHW: feature maps (B, C, H, W); they get no gradient.

    Returns:
        A scalar in squared units of the features.

    Raises:
        ConfigError: the shapes differ.

    Source: Yang et al., arXiv 2205.01529.
    """
    require(shape_problem("feature maps", generated_BCHW, teacher_BCHW))
    return (generated_BCHW - teacher_BCHW.detach()).square().sum() / len(teacher_BCHW)


@METHODS.register("mgd")
class MGD(PyramidLoss):
    """The teacher's map, generated from the student's with positions missing.

    At random positions, the same for all channels, the student's map is set to 0. Two 3x3
    convolutions with ReLU in between, trained with the student, generate the teacher's map from the
    rest; see ``generation_loss``.

    Args:
        setup: what it is built for; it needs the shapes.
        masked: probability that a position is missing.

    Raises:
        ConfigError: the shapes are missing.
    """

    weight = 2e-5
    two_stage_weight = 5e-7
    two_stage_settings: ClassVar[Mapping[str, float]] = {"masked": 0.45}
    source = (
        "Yang et al., ECCV 2022, arXiv 2205.01529; RetinaNet and Faster R-CNN of its repository"
    )

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        """Settings of the loss; two-stage detectors have others by default."""

        masked: float = option(
            0.65,
            "share of masked positions [default: 0.65, two-stage 0.45]",
            minimum=0.0,
            below=1.0,
        )

    bias = True

    def __init__(self, setup: Setup, *, masked: float):
        super().__init__(setup)
        self.require_shapes("each level generates maps of its own")
        self.masked = masked
        self.generators = nn.ModuleDict(
            {level: _generator(self.teacher_shapes[int(level)][0]) for level in self.adapters}
        )

    def level_loss(self, level: int, student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
        """Return ``generation_loss``; the mask is drawn from torch's generator."""
        student_BCHW, teacher_BCHW = self.aligned(level, student_BCHW, teacher_BCHW)
        kept_B1HW = torch.rand_like(student_BCHW[:, :1]) >= self.masked
        generated_BCHW = self.generators[str(level)](student_BCHW * kept_B1HW)
        return generation_loss(generated_BCHW, teacher_BCHW)


def _generator(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, kernel_size=3, padding=1),
    )
