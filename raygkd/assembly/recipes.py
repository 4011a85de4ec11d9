"""Configuration -> the parts of a training recipe.

Shapes: K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from raygkd.config import Config, RecipeConfig, flag
from raygkd.data.spec import ImageSpec
from raygkd.data.views import Views
from raygkd.engine.label_loss import LabelLoss
from raygkd.engine.mixing import Mixing
from raygkd.engine.patience import Patience
from raygkd.errors import ConfigError

# settings of a recipe that detectors have as well
_FOR_ALL = ("ema",)


def check_recipe(config: Config, task: str) -> None:
    """Check that a recipe applies to a task.

    Raises:
        ConfigError: it is for classification alone.
    """
    if task == "classification":
        return
    given, usual = vars(config.recipe), vars(RecipeConfig())
    wrong = [name for name in given if name not in _FOR_ALL and given[name] != usual[name]]
    if config.method.task_weight == 0:
        wrong.append("task_weight")
    if wrong:
        verb, them = ("applies", "it") if len(wrong) == 1 else ("apply", "them")
        raise ConfigError(
            f"{', '.join(map(flag, wrong))}: {verb} to classification only, and these images have "
            f"boxes: leave {them} out"
        )


def unused_cache(config: Config) -> str | None:
    """Return a note if the teacher's outputs cannot be cached, though they should be."""
    if not config.cluster.teacher_cache_mb or not config.recipe.mixes:
        return None
    return (
        "--teacher-cache-mb is not used: --mixup and --cutmix mix other images in every epoch, so "
        "the teacher's outputs are computed each time"
    )


def views_of(recipe: RecipeConfig) -> Views:
    """Return how the training images are changed after their crop."""
    policy = "randaugment" if recipe.randaugment else "none"
    return Views(policy="trivial-augment" if recipe.trivial_augment else policy, erase=recipe.erase)


def build_mixing(recipe: RecipeConfig, num_classes: int) -> Mixing | None:
    """Return what mixes the images of a batch; None if they are not mixed."""
    if not recipe.mixes:
        return None
    return Mixing(mixup=recipe.mixup, cutmix=recipe.cutmix, num_classes=num_classes)


def build_label_loss(recipe: RecipeConfig, spec: ImageSpec) -> LabelLoss:
    """Return the loss of a classifier on its labels."""
    is_balanced = recipe.class_weights == "balanced"
    return LabelLoss(
        recipe.label_smoothing, balanced_weights(spec.class_counts) if is_balanced else None
    )


def balanced_weights(class_counts: tuple[int, ...]) -> Tensor:
    """Return weights (K,) inversely proportional to the counts, whose mean over images is 1.

    A class without images has weight 0.
    """
    counts_K = torch.tensor(class_counts, dtype=torch.float32)
    weights_K = counts_K.sum() / (counts_K * (counts_K > 0).sum())
    return weights_K.masked_fill(counts_K == 0, 0.0)


def build_average(recipe: RecipeConfig, student: nn.Module) -> AveragedModel | None:
    """Return the moving average of a student, batch statistics included; None without one."""
    if not recipe.ema:
        return None
    average = get_ema_multi_avg_fn(recipe.ema)
    return AveragedModel(student, multi_avg_fn=average, use_buffers=True)


def build_patience(config: Config, spec: ImageSpec) -> Patience | None:
    """Return what stops a run that no longer improves; None if nothing does."""
    epochs = config.optim.patience
    return Patience(epochs, spec.score) if epochs is not None else None
