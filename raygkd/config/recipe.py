"""The settings of the training images' views, of their targets, and of averaged weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raygkd.config.values import flag, text_of
from raygkd.registry import option

# name -> defaults of settings that differ from the usual ones; docs/benchmarks/results.md has what
# was tried
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "quick": {"epochs": 5, "batch_size": 32},
    "standard": {},
    "patient": {"epochs": 60},
}


def recipe_options(name: str) -> str:
    """Return what a recipe sets, as it is written on the command line."""
    return " ".join(f"{flag(key)} {text_of(value)}" for key, value in RECIPES[name].items())


def _help() -> str:
    sets = "; ".join(f"{name}: {recipe_options(name) or 'the usual defaults'}" for name in RECIPES)
    return (
        f"named set of defaults, for classification; {sets}; a setting that you give overrides "
        "the recipe's"
    )


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """The views of the training images, their targets, and the average of the weights.

    Teacher and student always get the same view. All but ``ema`` are for classification alone.
    """

    recipe: str = option("standard", _help, choices=tuple(RECIPES))
    mixup: float = option(
        0.0,
        "blend each training image and its label with another of its batch, in a ratio drawn from "
        "Beta(ALPHA, ALPHA) (arXiv 1710.09412); with --cutmix, each batch uses one of the two at "
        "random; 0: off",
        minimum=0.0,
    )
    cutmix: float = option(
        0.0,
        "paste a random box of another image of the batch into each training image, and blend the "
        "labels by the box's area, which is drawn from Beta(ALPHA, ALPHA) (arXiv 1905.04899); 0: "
        "off",
        minimum=0.0,
    )
    randaugment: bool = option(
        False,
        "after --augment, change the colours or geometry of each training image twice: "
        "RandAugment (arXiv 1909.13719)",
    )
    trivial_augment: bool = option(
        False,
        "after --augment, change the colours or geometry of each training image once, by a random "
        "amount: TrivialAugment (arXiv 2103.10158)",
    )
    erase: float = option(
        0.0,
        "probability of blackening a random box of a training image (arXiv 1708.04896)",
        minimum=0.0,
        maximum=1.0,
    )
    label_smoothing: float = option(
        0.0,
        "share of each label that is spread evenly over all classes, in the labels' loss",
        minimum=0.0,
        below=1.0,
    )
    class_weights: str = option(
        "none",
        "weights of the images in the labels' loss; balanced: inversely proportional to the "
        "number of training images of their class",
        choices=("none", "balanced"),
    )
    ema: float = option(
        0.0,
        "decay per step of an exponential moving average of the student's weights, which is "
        "validated and kept instead of the student; at 0.99 it averages about 100 steps; 0: off",
        minimum=0.0,
        below=1.0,
    )

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed."""
        return bool(self.mixup or self.cutmix)
