"""The loop over an epoch. It calls no framework: data, ranks and the reporter are arguments.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from raygkd.engine.distributed import StopVote, all_sum, share_buffers
from raygkd.engine.loop import EpochPart, Training
from raygkd.engine.patience import STOPPED_EARLY
from raygkd.engine.step import Batch, check_terms, measure_shares, optimiser_step
from raygkd.engine.tasks import pixels
from raygkd.errors import Diverged, Stopped


def run_epoch(
    training: Training,
    is_asked_to_stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[Training], None] = lambda training: None,
) -> dict[str, float]:
    """Train one epoch, or the rest of it, score the validation split, and return the metrics.

    The metrics are "epoch" (from 1), "train_loss" (the weighted sum), "loss_NAME" for every
    unweighted term, the task's training metrics ("train_accuracy"), "val_score" and the other
    metrics of the validation split ("val_loss"), "lr" (of the next step), "epoch_seconds",
    "images_per_second" (training only, all ranks together) and "bad_images". The first epoch adds
    "gradient_NAME", as returned by ``check_terms``. If weights are shares of the labels' gradient,
    "factor_NAME" is the factor of the term in the total, at the end of the epoch. With ``lookup``,
    "teacher_cached" is the share of batches that skipped the teacher. The first epoch of this
    process adds "first_step_seconds", from ``begun`` to the end of its first step. "stopped_early"
    is 1 in the last epoch of a run whose patience is over. All metrics are equal on every rank,
    except the times, which each rank measures itself. The accuracy of mixed images is that of the
    class with the largest share. A second view of an image counts as another image.

    Args:
        training: the run, which changes in place.
        is_asked_to_stop: called after each step of the optimiser.
        on_step: called after each step of the optimiser, before that.

    Raises:
        Stopped: one or more ranks were asked to stop; ``training.part`` holds the partial epoch.
        Diverged: the loss of this epoch is not finite; raised on all ranks.
        ConfigError: see ``check_terms``; in the first epoch, raised on all ranks.
    """
    part = training.part = training.part or training.new_part()
    must_stop = StopVote(is_asked_to_stop, training.device)
    first_step = _train_steps(training, part, must_stop, on_step)
    metrics = _training_metrics(training, part) | first_step
    trained = time.perf_counter()
    metrics |= {f"val_{name}": value for name, value in evaluate(training, "val").items()}
    training.epoch += 1
    metrics |= {
        "epoch": training.epoch,
        "lr": training.optimizer.param_groups[0]["lr"],
        "epoch_seconds": part.seconds + time.perf_counter() - trained,
        "images_per_second": metrics.pop("images") / part.seconds,
    }
    if training.patience is not None:
        training.patience.add(metrics["val_score"])
        metrics |= {STOPPED_EARLY: 1.0} if training.patience.is_over else {}
    training.metrics, training.part = metrics, None
    return metrics


@torch.no_grad()
def evaluate(training: Training, split: str) -> dict[str, float]:
    """Return the scalar results of ``Task.score`` for the student, or its average, on a split."""

    def inputs(batch: Batch) -> Tensor:
        return training.normalise(pixels(batch, training.device))

    share_buffers(training.objective)
    if training.averaged is not None:
        share_buffers(training.averaged)
    model = training.model.eval()
    scores = training.task.score(model, training.stream.eval_batches(split), inputs)
    model.train()
    return {name: value for name, value in scores.items() if isinstance(value, float)}


def _train_steps(
    training: Training,
    part: EpochPart,
    must_stop: StopVote,
    on_step: Callable[[Training], None],
) -> dict[str, float]:
    """Train the remaining steps of an epoch; return "first_step_seconds" if measured."""
    first_step: dict[str, float] = {}
    started = time.perf_counter() - part.seconds
    training.objective.train()
    training.objective.lead = training.lead
    batches = itertools.islice(training.stream.train_batches(training.epoch), part.steps, None)
    for group in _groups(batches, training.accumulate):
        shown = [training.shown(batch, part.steps + number) for number, batch in enumerate(group)]
        _measure(training, part, shown[0])
        results = optimiser_step(training, shown)
        if training.begun is not None:
            first_step = {"first_step_seconds": time.perf_counter() - training.begun}
            training.begun = None
        for batch, (terms, output) in zip(shown, results, strict=True):
            part.meter.update(output, batch)
            part.losses.add(terms)
        part.steps += len(shown)
        part.seconds = time.perf_counter() - started
        on_step(training)
        if must_stop():
            raise Stopped
    return first_step


def _groups(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Yield batches in lists of ``size``; the last one may be shorter."""
    while group := list(itertools.islice(batches, size)):
        yield group


def _measure(training: Training, part: EpochPart, batch: Batch) -> None:
    """Check the terms before the first step; measure their gradients before the first few.

    A step of several batches is measured by the first of them, so that all have the same factors.
    """
    if training.epoch > 0 or part.steps > 0:
        measure_shares(training, batch)
        return
    part.gradient_norms = check_terms(training, batch)
    if training.objective.units is not None:
        training.objective.units.add(part.gradient_norms)


def _training_metrics(training: Training, part: EpochPart) -> dict[str, float]:
    device = training.device
    bad = torch.tensor(float(training.stream.bad_images), dtype=torch.float64, device=device)
    means = part.losses.compute()
    non_finite = [name for name, mean in means.items() if not abs(mean) < float("inf")]
    if non_finite:
        raise Diverged(non_finite[0], training.epoch + 1)
    return {
        "train_loss": means.pop("total"),
        **{f"loss_{name}": mean for name, mean in means.items()},
        **{f"gradient_{name}": norm for name, norm in part.gradient_norms.items()},
        **_factors(training),
        **({"teacher_cached": training.lookup.share(device)} if training.lookup else {}),
        **part.meter.compute(),
        "bad_images": float(all_sum(bad)),
    }


def _factors(training: Training) -> dict[str, float]:
    """Return the factors of the terms whose weights are shares of the labels' gradient."""
    units, factors = training.objective.units, training.objective.factors
    return {f"factor_{name}": factors[name] for name in (units.terms if units else ())}
