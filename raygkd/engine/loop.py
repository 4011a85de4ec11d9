"""The loop over epochs. It calls no framework: data, ranks and the reporter are given to it.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from raygkd.data.boxes import Boxes
from raygkd.engine.distributed import StopVote, all_sum, share_buffers
from raygkd.engine.means import RunningMeans
from raygkd.engine.objective import Objective, Teacher
from raygkd.engine.recall import Recall
from raygkd.engine.step import check_terms, gradient_norms, training_step
from raygkd.engine.tasks import Task, TrainingMeter, pixels
from raygkd.errors import Diverged, Stopped

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
class EpochPart:
    """The part of an epoch that this rank has trained.

    Attributes:
        meter, losses: of its steps.
        gradient_norms: what ``check_terms`` found, in the first epoch.
        steps: how many are done.
        seconds: that they took.
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
        task: what is learnt.
        objective: student, adapters and losses.
        parallel: the objective, wrapped by DDP where there are several ranks.
        teacher: the frozen model, or None.
        recall: spares the teacher what is known of it already, or None.
        stream: the rank's images.
        normalise, teacher_normalise: pixels in 0..1 to each model's own input.
        epochs: how many epochs the run has.
        epoch: how many are done.
        metrics: of the last epoch that is done.
        part: what is done of the epoch after it; None between epochs.
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
    metrics: dict[str, float] = field(default_factory=dict)
    part: EpochPart | None = None

    @property
    def progress(self) -> float:
        """The share of the run's steps that are done, from 0 to 1."""
        return self.schedule.last_epoch / max(1, self.epochs * self.stream.steps_per_epoch)

    def to_device(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        """Return images as float (B, C, H, W) in 0..1 and the task's targets, on the device."""
        return pixels(batch, self.device), self.task.targets(batch, self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the mixed-precision context of a forward pass."""
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)

    def run_epoch(self, is_asked_to_stop: Callable[[], bool] = lambda: False) -> dict[str, float]:
        """Train one epoch, or what is left of it, and score the validation split; return metrics.

        The metrics are "epoch" (from 1), "train_loss" (the weighted sum), "loss_NAME" for every
        unweighted term, what the task measures in training ("train_accuracy"), "val_score" and the
        other measures of the validation split ("val_loss"), "lr" (of the next step),
        "epoch_seconds", "images_per_second" (training only, all ranks together), "bad_images"; the
        first epoch has "gradient_NAME" too, what ``check_terms`` returns; where weights are shares
        of the labels' gradient, "factor_NAME" is what the term is multiplied by. With ``recall``
        there is "teacher_cached", the share of the batches that the teacher did not see. The first
        epoch of this process has "first_step_seconds", from ``begun`` to the end of its first step.
        They are equal on every rank, but for the times, which each rank measures.

        Args:
            is_asked_to_stop: is called after each step.

        Raises:
            Stopped: it was asked to, on one rank or more; ``part`` is what is done.
            Diverged: the loss of this epoch is not finite; on all ranks alike.
            ConfigError: see ``check_terms``; in the first epoch, on all ranks alike.
        """
        part = self.part = self.part or self.new_part()
        first_step = self._train_steps(part, StopVote(is_asked_to_stop, self.device))
        metrics = self._training_metrics(part) | first_step
        trained = time.perf_counter()
        metrics |= {f"val_{name}": value for name, value in self.evaluate("val").items()}
        self.epoch += 1
        metrics |= {
            "epoch": self.epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            "epoch_seconds": part.seconds + time.perf_counter() - trained,
            "images_per_second": metrics.pop("images") / part.seconds,
        }
        self.metrics, self.part = metrics, None
        return metrics

    def new_part(self) -> EpochPart:
        """Return an epoch of which nothing is done yet."""
        # the state of the generator is a function of (seed, epoch, rank), whatever ran before
        torch.manual_seed(hash_seed(self.seed, self.epoch, self.rank))
        return EpochPart(meter=self.task.meter(self.device), losses=RunningMeans(self.device))

    def _train_steps(self, part: EpochPart, must_stop: StopVote) -> dict[str, float]:
        """Train the steps of an epoch that are left; return "first_step_seconds" where it is."""
        first_step: dict[str, float] = {}
        started = time.perf_counter() - part.seconds
        self.objective.train()
        batches = itertools.islice(self.stream.train_batches(self.epoch), part.steps, None)
        for batch in batches:
            self._measure(part, batch)
            terms, output = training_step(self, batch)
            if self.begun is not None:
                first_step = {"first_step_seconds": time.perf_counter() - self.begun}
                self.begun = None
            part.meter.update(output, batch)
            part.losses.add(terms)
            part.steps += 1
            part.seconds = time.perf_counter() - started
            if must_stop():
                raise Stopped
        return first_step

    def _measure(self, part: EpochPart, batch: Mapping[str, Tensor]) -> None:
        """Before the first step check the terms; before the first few, measure their gradients."""
        is_first = self.epoch == part.steps == 0
        if is_first:
            part.gradient_norms = check_terms(self, batch)
        units = self.objective.units
        if units is not None and units.is_measuring:
            units.add(part.gradient_norms if is_first else gradient_norms(self, batch)[1])

    def _training_metrics(self, part: EpochPart) -> dict[str, float]:
        bad = torch.tensor(float(self.stream.bad_images), dtype=torch.float64, device=self.device)
        means = part.losses.compute()
        broken = [name for name, mean in means.items() if not abs(mean) < float("inf")]
        if broken:
            raise Diverged(broken[0], self.epoch + 1)
        return {
            "train_loss": means.pop("total"),
            **{f"loss_{name}": mean for name, mean in means.items()},
            **{f"gradient_{name}": norm for name, norm in part.gradient_norms.items()},
            **self._factors(),
            **({"teacher_cached": self.recall.share(self.device)} if self.recall else {}),
            **part.meter.compute(),
            "bad_images": float(all_sum(bad)),
        }

    def _factors(self) -> dict[str, float]:
        """Return what shares of the labels' gradient have become."""
        units, factors = self.objective.units, self.objective.factors
        return {f"factor_{name}": factors[name] for name in (units.terms if units else ())}

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, float]:
        """Return the numbers that ``Task.score`` does, of the student on a split."""
        student = self.objective.student
        share_buffers(self.objective)
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
