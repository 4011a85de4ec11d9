"""Similarities between the tokens of an image, and of an image to earlier ones.

Shape letters: B batch, C channels, H height, W width, N = H * W tokens, Q images in the queue.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raygkd.graph import full_precision, normalised_channels, require, temperature_problem
from raygkd.losses.base import FeatureLoss, Setup
from raygkd.registry import METHODS, option

# a product with no vector: its softmax is exactly 0, and unlike of infinity its divergence too
EMPTY = -1e4


@full_precision
def token_loss(student_BCHW: Tensor, teacher_BCHW: Tensor, temperature: float) -> Tensor:
    """Return ``KL(p_t || p_s)`` of the similarities between an image's tokens, averaged over rows.

    A token is the vector (C) of a position, divided by its Euclidean norm. Row i of p is the
    softmax of the cosines between token i and all tokens of the image, divided by T. The student's
    map is resized to the teacher's grid first.

    Args:
        student_BCHW: feature maps (B, C_s, H_s, W_s).
        teacher_BCHW: feature maps (B, C_t, H, W); they get no gradient. The similarities take
            memory of B (H W)^2.
        temperature: T > 0.

    Returns:
        A scalar in nats.

    Raises:
        ConfigError: the temperature is not above 0.

    Source: [ours], after the description of LightlyTrain's distillation.
    """
    require(temperature_problem(temperature))
    grid = (teacher_BCHW.shape[2], teacher_BCHW.shape[3])
    if student_BCHW.shape[2:] != grid:
        student_BCHW = F.interpolate(student_BCHW, grid, mode="bilinear", antialias=True)
    student_BNN, teacher_BNN = (
        tokens_BNC @ tokens_BNC.mT / temperature
        for tokens_BNC in (_tokens(student_BCHW), _tokens(teacher_BCHW.detach()))
    )
    return _divergence(student_BNN.flatten(0, 1), teacher_BNN.flatten(0, 1))


def _tokens(features_BCHW: Tensor) -> Tensor:
    """Return the tokens (B, N, C) of unit length; one of zeros stays so, without gradient."""
    return normalised_channels(features_BCHW.flatten(2).mT[..., None])


def _divergence(student_RN: Tensor, teacher_RN: Tensor) -> Tensor:
    """Return the divergence of the softmax of rows, averaged over rows."""
    student_RN, teacher_RN = student_RN.log_softmax(1), teacher_RN.log_softmax(1)
    return F.kl_div(student_RN, teacher_RN, reduction="batchmean", log_target=True)


class Queue(nn.Module):
    """The latest vectors, in a ring; under DDP those of rank 0, as all buffers.

    Args:
        length: Q.
        channels: C.
    """

    vectors_QC: Tensor
    count: Tensor

    def __init__(self, length: int, channels: int):
        super().__init__()
        self.register_buffer("vectors_QC", torch.zeros(length, channels))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, vectors_BC: Tensor) -> None:
        """Add vectors (B, C); the oldest are replaced."""
        length = len(self.vectors_QC)
        newest_BC = vectors_BC[-length:].to(self.vectors_QC.dtype)
        places_B = (self.count + torch.arange(len(newest_BC), device=self.count.device)) % length
        self.vectors_QC.index_copy_(0, places_B, newest_BC)
        self.count += len(newest_BC)

    def scores(self, vectors_BC: Tensor) -> Tensor:
        """Return the products (B, Q) with the vectors; ``EMPTY`` where there is none yet."""
        is_empty_Q = torch.arange(len(self.vectors_QC), device=self.count.device) >= self.count
        # a copy: the next batch changes the ring, perhaps before this one's backward pass
        products_BQ = vectors_BC @ self.vectors_QC.to(vectors_BC.dtype, copy=True).mT
        return products_BQ.masked_fill(is_empty_Q, EMPTY)


@METHODS.register("dense")
class Dense(FeatureLoss):
    """Similarities of the tokens of an image, and of the image to earlier ones of the teacher.

    The first part is ``token_loss``. For the second, the maps' means over their positions, the
    student's after a linear layer that is trained with it, are divided by their norm and compared
    with the teacher's of the latest images, this batch's among them: the divergence of the softmax
    of the cosines, divided by the same temperature. Neither part needs labels.

    Args:
        setup: what it is built for; it needs the shapes.
        temperature: of both parts.
        queue: number of images that are compared with.

    Raises:
        ConfigError: the shapes are missing, or the temperature is not above 0.
    """

    weight = 1.0
    levels = "last"
    source = "ours, after the description of LightlyTrain's distillation"

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        """Settings of the loss."""

        temperature: float = option(0.07, "temperature of the similarities", above=0.0)
        queue: int = option(4096, "number of earlier images to compare with", minimum=2)

    def __init__(self, setup: Setup, *, temperature: float, queue: int):
        super().__init__(setup)
        require(temperature_problem(temperature))
        self.require_shapes("each level has a projection and a queue of its own")
        self.temperature = temperature
        levels = self._levels(self.student_shapes)
        student, teacher = self.student_shapes, self.teacher_shapes
        self.projections = nn.ModuleDict(
            {str(level): nn.Linear(student[level][0], teacher[level][0]) for level in levels}
        )
        self.queues = nn.ModuleDict(
            {str(level): Queue(queue, teacher[level][0]) for level in levels}
        )

    def level_loss(self, level: int, student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
        """Return the sum of both parts; in training, the teacher's means enter the queue."""
        tokens = token_loss(student_BCHW, teacher_BCHW, self.temperature)
        teacher_BC = F.normalize(teacher_BCHW.mean((2, 3)))
        student_BC = F.normalize(self.projections[str(level)](student_BCHW.mean((2, 3))))
        queue = self.queues[str(level)]
        assert isinstance(queue, Queue)
        if self.training:
            queue.push(teacher_BC)
        student_BQ, teacher_BQ = (
            queue.scores(vectors_BC) / self.temperature for vectors_BC in (student_BC, teacher_BC)
        )
        return tokens + _divergence(student_BQ, teacher_BQ)
