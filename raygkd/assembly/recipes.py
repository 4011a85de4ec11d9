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
from raygkd.losses import baseline_class, baseline_of

# settings of a recipe that detectors have as well
_FOR_ALL = ("ema",)


def check_recipe(config: Config, task: str) -> None:
    """Check that a recipe applies to a task.

    Raises:
        ConfigError: it is for classification alone.
    """
    if task == "classification":
        return
    if config.recipe.recipe != RecipeConfig.recipe:
        raise ConfigError(
            f"--recipe {config.recipe.recipe}: is for classification only, and these images have "
            "boxes; omit it"
        )
    given, usual = vars(config.recipe), vars(RecipeConfig())
    wrong = [name for name in given if name not in _FOR_ALL and given[name] != usual[name]]
    if config.method.task_weight == 0:
        wrong.append("task_weight")
    if config.data.unlabelled is not None:
        wrong.append("unlabelled")
    if wrong:
        verb, them = ("applies", "it") if len(wrong) == 1 else ("apply", "them")
        raise ConfigError(
            f"{', '.join(map(flag, wrong))}: {verb} to classification only, and these images have "
            f"boxes; omit {them}"
        )


def has_two_views(method: str) -> bool:
    """Return whether a method's loss compares two views of each training image."""
    baseline = baseline_of(method)
    return baseline is not None and baseline_class(baseline).two_views


def changes_batches(config: Config) -> bool:
    """Return whether each batch has images that no other has, as the training process makes them.

    The teacher's outputs for them cannot be cached.
    """
    return config.recipe.mixes or has_two_views(config.method.method)


def unused_cache(config: Config) -> str | None:
    """Return a note if the teacher's outputs cannot be cached, though they should be."""
    if not config.cluster.teacher_cache_mb or not changes_batches(config):
        return None
    reason = "--mixup and --cutmix mix different images in every epoch"
    if not config.recipe.mixes:
        reason = f"--method {config.method.method} changes images in another way in every epoch"
    return (
        f"--teacher-cache-mb has no effect: {reason}, so the teacher's outputs are computed each "
        "time"
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


def build_label_loss(recipe: RecipeConfig, spec: ImageSpec, *, partly: bool = False) -> LabelLoss:
    """Return the loss of a classifier on its labels, which with ``partly`` some images lack."""
    is_balanced = recipe.class_weights == "balanced"
    return LabelLoss(
        recipe.label_smoothing,
        balanced_weights(spec.class_counts) if is_balanced else None,
        partly=partly,
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
