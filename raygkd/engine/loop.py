"""The loop over epochs. It calls no framework: data, ranks and the reporter are given to it.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from raygkd.data.boxes import Boxes
from raygkd.engine.distributed import all_sum, share_buffers
from raygkd.engine.means import RunningMeans
from raygkd.engine.objective import Objective, Teacher
from raygkd.engine.recall import Recall
from raygkd.engine.step import check_terms, training_step
from raygkd.engine.tasks import Task, pixels
from raygkd.errors import Diverged

Normalise = Callable[[Tensor], Tensor]


class Stream(Protocol):
    """One rank's images; every rank gets the same number of training batches."""

    @property
    def steps_per_epoch(self) -> int:
        """How many training batches every rank gets in an epoch."""

    @property
    def bad_images(self) -> int:
        """How many different broken images this rank has met so far."""

    @property
    def boxes(self) -> Boxes | None:
        """The boxes of every image of the table, where it is for detection."""

    def train_batches(self, epoch: int) -> Iterator[Mapping[str, Tensor]]:
        """Yield ``steps_per_epoch`` batches: "image" uint8 (B, C, H, W) and the task's targets."""

    def eval_batches(self, split: str) -> Iterator[Mapping[str, Tensor]]:
        """Yield this rank's share of a split; the shares hold every image exactly once."""

    def close(self) -> None:
        """Stop reading ahead."""


@dataclass(kw_only=True)
class Training:
    """Everything one rank of a run owns.

    Attributes:
        task: what is learnt.
        objective: student, adapters and losses.
        parallel: the objective, wrapped by DDP where there are several ranks.
        teacher: the frozen model, or None.
        recall: spares the teacher what is known of it already, or None.
        stream: the rank's images.
        normalise, teacher_normalise: pixels in 0..1 to each model's own input.
        epochs: how many epochs the run has.
        epoch: how many are done.
        begun: when this process began to prepare the run, as ``time.perf_counter`` tells it; None
            from its first step on.
        amp: dtype of autocast, or None.
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
    recall: Recall | None = None
    rank: int = 0
    clip_norm: float | None = None
    amp: torch.dtype | None = None
    config: str = ""
    epoch: int = 0

    def to_device(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        """Return images as float (B, C, H, W) in 0..1 and the task's targets, on the device."""
        return pixels(batch, self.device), self.task.targets(batch, self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the mixed-precision context of a forward pass."""
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)

    def run_epoch(self) -> dict[str, float]:
        """Train one epoch and score the validation split; return the epoch's metrics.

        The metrics are "epoch" (from 1), "train_loss" (the weighted sum), "loss_NAME" for every
        unweighted term, what the task measures in training ("train_accuracy"), "val_score" and the
        other measures of the validation split ("val_loss"), "lr" (of the next step),
        "epoch_seconds", "images_per_second" (training only, all ranks together), "bad_images"; the
        first epoch has "gradient_NAME" too, what ``check_terms`` returns. With ``recall`` there is
        "teacher_cached", the share of the batches that the teacher did not see. The first epoch of
        this process has "first_step_seconds", from ``begun`` to the end of its first step. They are
        equal on every rank, but for the times, which each rank measures.

        Raises:
            Diverged: the loss of this epoch is not finite; on all ranks alike.
            ConfigError: see ``check_terms``; in the first epoch, on all ranks alike.
        """
        started = time.perf_counter()
        metrics = self._train_epoch()
        trained = time.perf_counter()
        metrics |= {f"val_{name}": value for name, value in self.evaluate("val").items()}
        self.epoch += 1
        metrics |= {
            "epoch": self.epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            "epoch_seconds": time.perf_counter() - started,
            "images_per_second": metrics.pop("images") / (trained - started),
        }
        return metrics

    def _train_epoch(self) -> dict[str, float]:
        # the state of the generator is a function of (seed, epoch, rank), whatever ran before
        torch.manual_seed(hash_seed(self.seed, self.epoch, self.rank))
        meter = self.task.meter(self.device)
        losses = RunningMeans(self.device)
        gradient_norms: dict[str, float] = {}
        first_step: dict[str, float] = {}
        self.objective.train()
        for step, batch in enumerate(self.stream.train_batches(self.epoch)):
            if self.epoch == 0 and step == 0:
                gradient_norms = check_terms(self, batch)
            terms, output = training_step(self, batch)
            if self.begun is not None:
                first_step = {"first_step_seconds": time.perf_counter() - self.begun}
                self.begun = None
            meter.update(output, batch)
            losses.add(terms)
        bad = torch.tensor(float(self.stream.bad_images), dtype=torch.float64, device=self.device)
        means = losses.compute()
        broken = [name for name, mean in means.items() if not abs(mean) < float("inf")]
        if broken:
            raise Diverged(broken[0], self.epoch + 1)
        return {
            "train_loss": means.pop("total"),
            **{f"loss_{name}": mean for name, mean in means.items()},
            **{f"gradient_{name}": norm for name, norm in gradient_norms.items()},
            **first_step,
            **({"teacher_cached": self.recall.share(self.device)} if self.recall else {}),
            **meter.compute(),
            "bad_images": float(all_sum(bad)),
        }

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, float]:
        """Return the numbers that ``Task.score`` does, of the student on a split."""
        student = self.objective.student
        share_buffers(student)
        student.eval()
        scores = self.task.score(student, self.stream.eval_batches(split), self._eval_inputs)
        student.train()
        return {name: value for name, value in scores.items() if isinstance(value, float)}

    def _eval_inputs(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.normalise(pixels(batch, self.device))


def hash_seed(seed: int, epoch: int, rank: int) -> int:
    """Return one seed for (seed, epoch, rank), by torch-independent integer mixing."""
    value = (seed * 1_000_003 + epoch) * 1_000_003 + rank
    return (value * 0x9E3779B97F4A7C15) % (1 << 63)


def fit(training: Training, report: Callable[[dict[str, float], Training], None]) -> None:
    """Train all epochs that are left; ``report`` gets each one's metrics, on every rank."""
    while training.epoch < training.epochs:
        report(training.run_epoch(), training)
