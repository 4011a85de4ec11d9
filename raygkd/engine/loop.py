"""The state of a run on one rank, on which the loop over epochs works.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from raygkd.data.boxes import Boxes
from raygkd.engine.means import RunningMeans
from raygkd.engine.mixing import Mixing
from raygkd.engine.objective import Objective, Teacher
from raygkd.engine.patience import Patience
from raygkd.engine.second_view import with_second_view
from raygkd.engine.tasks import Task, TrainingMeter, pixels
from raygkd.engine.teacher_lookup import TeacherLookup

# the share of its score by which a teacher is ahead while the graph losses have their full weights
FULL_LEAD = 0.25
Normalise = Callable[[Tensor], Tensor]


class Stream(Protocol):
    """One rank's images; every rank gets the same number of training batches."""

    @property
    def steps_per_epoch(self) -> int:
        """How many training batches every rank gets in an epoch."""

    @property
    def bad_images(self) -> int:
        """How many different unreadable images this rank has skipped so far."""

    @property
    def boxes(self) -> Boxes | None:
        """The boxes of every image of the table, for detection; otherwise None."""

    def train_batches(self, epoch: int) -> Iterator[Mapping[str, Tensor]]:
        """Yield ``steps_per_epoch`` batches: "image" uint8 (B, C, H, W) and the task's targets."""

    def eval_batches(self, split: str) -> Iterator[Mapping[str, Tensor]]:
        """Yield this rank's share of a split; the shares hold every image exactly once.

        Besides "val" and "test" there is "labelled", if models are ranked by "knn": the labelled
        training images.
        """

    def close(self) -> None:
        """Stop prefetching."""


@dataclass(kw_only=True)
class EpochPart:
    """The part of an epoch that this rank has trained.

    Attributes:
        meter, losses: training metrics and mean losses of its steps.
        gradient_norms: result of ``check_terms``, in the first epoch.
        steps: number of completed batches.
        seconds: time they took.
    """

    meter: TrainingMeter
    losses: RunningMeans
    gradient_norms: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0


@dataclass(kw_only=True)
class Training:
    """Everything one rank of a run owns.

    Attributes:
        task: classification or detection.
        objective: student, adapters and losses.
        parallel: the objective, wrapped by DDP if there are several ranks.
        teacher: the frozen model, or None.
        lookup: returns cached outputs of the teacher where possible, or None.
        stream: the rank's images.
        normalise, teacher_normalise: map pixels in 0..1 to each model's input.
        epochs: number of epochs of the run.
        epoch: number of completed epochs.
        metrics: metrics of the last completed epoch.
        part: the completed part of the current epoch; None between epochs.
        begun: when this process began to prepare the run, by ``time.perf_counter``; None once its
            first step is done.
        amp: dtype of autocast, or None.
        accumulate: batches per step of the optimiser.
        two_views: each training batch is followed by a second view of its images.
        mixing: mixes the images of each training batch, or None.
        averaged: the moving average of the student, which is scored instead of it, or None.
        patience: ends the run when it no longer improves, or None.
        teacher_score: the teacher's ``lead_score`` of the task on the validation images; None if
            the losses do not fade with its lead.
    """

    task: Task
    objective: Objective
    parallel: nn.Module
    teacher: Teacher | None
    stream: Stream
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    normalise: Normalise
    teacher_normalise: Normalise
    device: torch.device
    begun: float | None
    epochs: int
    seed: int
    lookup: TeacherLookup | None = None
    rank: int = 0
    clip_norm: float | None = None
    amp: torch.dtype | None = None
    accumulate: int = 1
    two_views: bool = False
    mixing: Mixing | None = None
    averaged: AveragedModel | None = None
    patience: Patience | None = None
    teacher_score: float | None = None
    config: str = ""
    epoch: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    part: EpochPart | None = None

    @property
    def progress(self) -> float:
        """The completed share of the run's steps, from 0 to 1."""
        steps = self.epochs * math.ceil(self.stream.steps_per_epoch / self.accumulate)
        return self.schedule.last_epoch / max(1, steps)

    @property
    def lead(self) -> float:
        """The teacher's lead over the student after the last epoch, from 0 to 1.

        It is 1 without a teacher's score, and until the student has three quarters of it; from
        there it falls linearly to 0 where the student is ahead [ours].
        """
        if self.teacher_score is None or not self.metrics:
            return 1.0
        ahead = self.teacher_score - self.metrics[f"val_{self.task.lead_score}"]
        if self.teacher_score <= 0:
            return 0.0
        return min(1.0, max(0.0, ahead) / (FULL_LEAD * self.teacher_score))

    @property
    def is_over(self) -> bool:
        """Whether no epoch is left to train."""
        is_patient = self.patience is None or not self.patience.is_over
        return self.epoch >= self.epochs or not is_patient

    @property
    def model(self) -> nn.Module:
        """The model that is scored and kept: the student, or its average."""
        return self.objective.student if self.averaged is None else self.averaged.module

    def shown(self, batch: Mapping[str, Tensor], number: int) -> Mapping[str, Tensor]:
        """Return a batch as models are shown it: in two views, and mixed, if the run says so.

        Args:
            batch: a training batch.
            number: of the batch in the epoch, from 0.
        """
        seed = hash_seed(hash_seed(self.seed, self.epoch, self.rank), number, 0)
        if self.two_views:
            batch = with_second_view(batch, seed)
        return batch if self.mixing is None else self.mixing(batch, seed, self.device)

    def to_device(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        """Return images as float (B, C, H, W) in 0..1 and the task's targets, on the device."""
        return pixels(batch, self.device), self.task.targets(batch, self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the mixed-precision context of a forward pass."""
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)

    def new_part(self) -> EpochPart:
        """Return the empty part of a new epoch."""
        # seeds the generator by (seed, epoch, rank), independent of anything that ran before
        torch.manual_seed(hash_seed(self.seed, self.epoch, self.rank))
        return EpochPart(meter=self.task.meter(self.device), losses=RunningMeans(self.device))


def hash_seed(seed: int, epoch: int, rank: int) -> int:
    """Return one seed for (seed, epoch, rank), by integer mixing that does not depend on torch."""
    value = (seed * 1_000_003 + epoch) * 1_000_003 + rank
    return (value * 0x9E3779B97F4A7C15) % (1 << 63)
