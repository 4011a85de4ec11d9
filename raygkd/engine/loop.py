"""The loop over epochs. It calls no framework: data, ranks and the reporter are given to it.

Shapes: B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from raygkd.engine.distributed import all_sum, share_buffers
from raygkd.engine.objective import Objective, Teacher
from raygkd.engine.step import check_terms, training_step
from raygkd.errors import Diverged
from raygkd.metrics import ClassificationMeter

Normalise = Callable[[Tensor], Tensor]


class Stream(Protocol):
    """One rank's images; every rank gets the same number of training batches."""

    @property
    def steps_per_epoch(self) -> int:
        """How many training batches every rank gets in an epoch."""

    @property
    def bad_images(self) -> int:
        """How many different broken images this rank has met so far."""

    def train_batches(self, epoch: int) -> Iterator[Mapping[str, Tensor]]:
        """Yield ``steps_per_epoch`` batches of "image" uint8 (B, C, H, W) and "label" (B,)."""

    def eval_batches(self, split: str) -> Iterator[Mapping[str, Tensor]]:
        """Yield this rank's share of a split; the shares hold every image exactly once."""

    def close(self) -> None:
        """Stop reading ahead."""


@dataclass(kw_only=True)
class Training:
    """Everything one rank of a run owns.

    Attributes:
        objective: student, adapters and losses.
        parallel: the objective, wrapped by DDP where there are several ranks.
        teacher: the frozen model, or None.
        stream: the rank's images.
        normalise, teacher_normalise: pixels in 0..1 to each model's own input.
        epochs: how many epochs the run has.
        epoch: how many are done.
        amp: dtype of autocast, or None.
    """

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
    num_classes: int
    epochs: int
    seed: int
    rank: int = 0
    clip_norm: float | None = None
    amp: torch.dtype | None = None
    config: str = ""
    epoch: int = 0

    def to_device(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return images as float (B, C, H, W) in 0..1 and labels (B,) on the device."""
        images_BCHW = batch["image"].to(self.device, non_blocking=True)
        return images_BCHW.float().div_(255.0), batch["label"].to(self.device, non_blocking=True)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the mixed-precision context of a forward pass."""
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)

    def run_epoch(self) -> dict[str, float]:
        """Train one epoch and score the validation split; return the epoch's metrics.

        The metrics are "epoch" (from 1), "train_loss" (the weighted sum), "loss_NAME" for every
        unweighted term, "train_accuracy", "val_score" and "val_loss", "lr" (of the next step),
        "epoch_seconds", "images_per_second" (training only, all ranks together), "bad_images"; the
        first epoch has "gradient_NAME" too, what ``check_terms`` returns. They are equal on every
        rank, but for the times, which each rank measures.

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
        meter = ClassificationMeter(self.num_classes, device=self.device)
        sums: dict[str, Tensor] = {}
        gradient_norms: dict[str, float] = {}
        self.objective.train()
        for batch in self.stream.train_batches(self.epoch):
            if self.epoch == 0 and not sums:
                gradient_norms = check_terms(self, batch)
            terms, logits_BK = training_step(self, batch)
            meter.update(logits_BK, batch["label"].to(self.device))
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.double()
        names = list(sums)
        bad = torch.tensor(float(self.stream.bad_images), dtype=torch.float64, device=self.device)
        steps = torch.ones_like(bad) * self.stream.steps_per_epoch
        *totals, bad_images, all_steps = all_sum(torch.stack([*sums.values(), bad, steps])).tolist()
        means = {name: total / all_steps for name, total in zip(names, totals, strict=True)}
        broken = [name for name, mean in means.items() if not abs(mean) < float("inf")]
        if broken:
            raise Diverged(broken[0], self.epoch + 1)
        meter.reduce(all_sum)
        scores = meter.compute()
        return {
            "train_loss": means.pop("total"),
            **{f"loss_{name}": mean for name, mean in means.items()},
            **{f"gradient_{name}": norm for name, norm in gradient_norms.items()},
            "train_accuracy": scores["accuracy"],
            "images": scores["count"],
            "bad_images": bad_images,
        }

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, float]:
        """Return "score" (top-1 accuracy), "loss" and, beyond 5 classes, "top5" of a split."""
        student = self.objective.student
        share_buffers(student)
        student.eval()
        scores = score_classifier(
            student, self.stream.eval_batches(split), self.num_classes, self._eval_input
        )
        student.train()
        return scores

    def _eval_input(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        images_BCHW, labels_B = self.to_device(batch)
        return self.normalise(images_BCHW), labels_B


@torch.no_grad()
def score_classifier(
    model: nn.Module,
    batches: Iterator[Mapping[str, Tensor]],
    num_classes: int,
    prepare: Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor]],
) -> dict[str, float]:
    """Return "score", "loss" and "top5" of a classifier over batches, summed over all ranks.

    ``prepare`` turns a batch into the model's input and labels on its device.
    """
    meter: ClassificationMeter | None = None
    for batch in batches:
        images_BCHW, labels_B = prepare(batch)
        meter = meter or ClassificationMeter(num_classes, device=images_BCHW.device)
        meter.update(model(images_BCHW), labels_B)
    meter = meter or ClassificationMeter(num_classes, device=next(model.parameters()).device)
    meter.reduce(all_sum)
    scores = meter.compute()
    keep = {"score": scores["accuracy"], "loss": scores["loss"]}
    return keep | ({"top5": scores["top5"]} if "top5" in scores else {})


def hash_seed(seed: int, epoch: int, rank: int) -> int:
    """Return one seed for (seed, epoch, rank), by torch-independent integer mixing."""
    value = (seed * 1_000_003 + epoch) * 1_000_003 + rank
    return (value * 0x9E3779B97F4A7C15) % (1 << 63)


def fit(training: Training, report: Callable[[dict[str, float], Training], None]) -> None:
    """Train all epochs that are left; ``report`` gets each one's metrics, on every rank."""
    while training.epoch < training.epochs:
        report(training.run_epoch(), training)
