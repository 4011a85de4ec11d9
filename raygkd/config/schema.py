"""Every setting of a run: its section, default, help and limits.

Every leaf has a name that no other leaf has, so that a setting is called the same on the command
line (``--batch-size``), in a YAML file (``optim: {batch_size: 64}``) and in a search space
(``batch_size: {choice: [32, 64]}``). What a registered method or data set declares is called
METHOD.SETTING or DATASET.OPTION (``--set dkd.beta=8``, ``method: {dkd: {beta: 8}}``,
``dkd.beta: {choice: [4, 8]}``).
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raygkd.config.values import WorkerRange
from raygkd.registry import DATASETS, METHODS, either, option

PRESETS = ("ablation",)
LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how they reach the model."""

    dataset: str = option(
        "digits",
        lambda: f"{', '.join(DATASETS.names())}; or parquet",
    )
    data_dir: str | None = option(None, "folder (or s3://, gs:// path) the data set is read from")
    download: bool = option(
        False,
        lambda: (
            f"fetch {either(DATASETS.names_with('can_fetch'))} into --data-dir when it is not there"
        ),
    )
    years: tuple[int, ...] = option((2007, 2012), "voc: whose trainval images are for training")
    classes: tuple[str, ...] | None = option(None, "boxes of these classes only [default: all]")
    strict: bool = option(False, "refuse faulty annotations instead of dropping them")
    val_fraction: float = option(
        0.1, "share of the training images cut off for validation", above=0.0, below=1.0
    )
    test_fraction: float = option(
        0.1, "share cut off for the test where the data has no test split", above=0.0, below=1.0
    )
    limit_train: int | None = option(
        None, "train on this many images only [default: all]", minimum=1
    )
    image_size: int | None = option(
        None,
        "side of the square model input in pixels [default: the data's own, else 224; for "
        "detection the data's own up to 640]",
        minimum=4,
    )
    augment: str = option(
        "auto",
        "random changes to training images",
        choices=("auto", "none", "crop", "crop-flip", "resized-crop", "jitter", "jitter-flip"),
    )
    score: str = option(
        "auto",
        "what detectors are ranked by; auto is map for coco, and map50 for others",
        choices=("auto", "map", "map50"),
    )
    skip_bad: bool = option(False, "skip and count unreadable images instead of stopping")
    cache_mb: int = option(
        1024,
        "decode the images once into shared memory if they fit in this many MiB, else stream them",
        minimum=0,
    )
    # those of registered data sets that are given: DATASET.OPTION -> value
    own: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The pair of models."""

    teacher: str = option("resnet20", "name of a model, or a model file that raygkd wrote")
    student: str = option("resnet8", "name of a model")
    teacher_epochs: int = option(
        20, "epochs for the teacher that is trained when --teacher is a name", minimum=1
    )
    teacher_weights: str | None = option(
        None,
        "what a detector's training as teacher starts from: a file of weights (also a model file "
        "that raygkd wrote), imagenet for its backbone, or coco",
    )
    student_weights: str | None = option(
        None,
        "what a detector's training as student starts from: a file of weights (also a model file "
        "that raygkd wrote), imagenet for its backbone, or coco",
    )
    inherit: bool | None = option(
        None,
        "start a detector's neck and head from the teacher's where shapes agree [default: when it "
        "distils, unless --student-weights is a file]",
    )


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What the student learns from besides the labels (see raygkd.losses)."""

    method: str = option("graph", "what is distilled", choices=METHODS.names)
    levels: tuple[int, ...] | None = option(
        None, "stages whose graphs are matched, 1 is the shallowest [default: all]"
    )
    temperature: float = option(
        20.0,
        "attention temperature T of the graph losses, in units of the map's mean magnitude; at 20 "
        "all positions and channels count nearly alike",
        above=0.0,
    )
    dim: int = option(
        8, "spectral dimension d, below the teacher's channels at every level", minimum=1
    )
    graphs: str = option(
        "batch",
        "what has a graph of channels: the whole batch, or each image",
        choices=("batch", "image"),
    )
    spectral_mode: str = option(
        "residual",
        "form of the spectral loss of --graphs image",
        choices=("residual", "subspace", "procrustes"),
    )
    attention: str = option(
        "outer",
        "form of the relational attention of --graphs image",
        choices=("outer", "softmax"),
    )
    weights: str = option(
        "shifted",
        "edge weights of the spectral graph of --graphs image: (1+A)/2 or A",
        choices=("shifted", "cosine"),
    )
    adapter: str = option(
        "normalised",
        "what the student's channels go through to the teacher's: a 1x1 convolution, plain or with "
        "batch normalisation behind it; a plain one diverges where the weights are large",
        choices=("plain", "normalised"),
    )
    centre: bool = option(
        False, "compare channels without their means over the positions: correlations, not cosines"
    )
    weights_unit: str = option(
        "gradient",
        "unit of --alpha, --beta, --gamma and --baseline-weight: at 1 a term moves the student as "
        "much as the labels do, measured over the first steps; loss: weights multiply the losses, "
        "and --temperature is in units of the features",
        choices=("gradient", "loss"),
    )
    alpha: float = option(3.0, "weight of the vertex loss", minimum=0.0)
    beta: float = option(0.0, "weight of the edge loss", minimum=0.0)
    gamma: float = option(0.0, "weight of the spectral loss", minimum=0.0)
    foreground: float | None = option(
        None,
        "share of the vertex loss that lies in the boxes of objects [default: by area]",
        above=0.0,
        below=1.0,
    )
    kd_temperature: float = option(
        4.0, "temperature of the logits in kd, graph+kd and dkd", above=0.0
    )
    kd_weight: float = option(
        0.9, "share w of kd and in graph+kd: (1-w) CE + w KD", above=0.0, maximum=1.0
    )
    baseline_weight: float | None = option(
        None,
        "weight of the loss of a method that is neither ours nor kd [default: the published one]",
        above=0.0,
    )
    # those of registered methods that are given: METHOD.SETTING -> value
    own: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser and its schedule."""

    epochs: int = option(10, "passes over the training images", minimum=1)
    batch_size: int = option(64, "images per step over all workers together", minimum=1)
    optimizer: str = option("sgd", "how gradients become steps", choices=("sgd", "adamw"))
    lr: float = option(0.05, "learning rate at its highest", above=0.0)
    momentum: float = option(0.9, "momentum of SGD, first beta of AdamW", minimum=0.0, below=1.0)
    weight_decay: float = option(5e-4, "weight decay", minimum=0.0)
    schedule: str = option(
        "cosine", "how the learning rate falls", choices=("cosine", "multistep", "constant")
    )
    warmup_epochs: float = option(0.0, "epochs of linear rise of the learning rate", minimum=0.0)
    milestones: tuple[float, ...] = option(
        (0.625, 0.75, 0.875), "multistep: shares of all epochs after which the rate falls"
    )
    lr_decay: float = option(0.1, "multistep: factor of each fall", above=0.0, below=1.0)
    clip_norm: float | None = option(
        None, "clip the gradient's norm at this value [default: no clipping]", above=0.0
    )
    amp: str = option(
        "auto",
        "mixed precision; auto is bf16 on CUDA and none on a CPU",
        choices=("auto", "none", "bf16", "fp16"),
    )
    compile: bool = option(False, "compile the models with torch.compile")
    seed: int = option(
        0, "seed of initial weights, data order and augmentation", minimum=0, maximum=LARGEST_SEED
    )


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """What a run takes of the Ray cluster."""

    workers: WorkerRange = option(
        WorkerRange(1, 1),
        "training processes of one run (DDP when more than 1); A-B: as many as there is room for, "
        "at most B, and no fewer than A when nodes are lost",
        minimum=1,
    )
    gpus_per_worker: float = option(0.0, "GPUs of each training process", minimum=0.0)
    cpus_per_worker: float | None = option(
        None,
        "CPUs of each training process [default: 1 in a search, else a share of the machine]",
        above=0.0,
    )
    max_failures: int = option(
        3, "how many lost processes or nodes a run or trial goes on after", minimum=0
    )
    teacher_cache_mb: int = option(
        0,
        "keep what the teacher says of the training images in this many MiB of shared memory, for "
        "all trials and epochs that see them again; 0: keep nothing",
        minimum=0,
    )
    address: str | None = option(None, "address of a running Ray cluster [default: start one here]")
    wait_minutes: float = option(
        0.0,
        "how long to wait for nodes of a cluster that grows by itself, where there is no room; a "
        "search then asks for room for --max-concurrent trials",
        minimum=0.0,
    )


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Where results go."""

    output: str = option(
        "raygkd-output",
        "folder (or s3://, gs:// path) for data, teachers, checkpoints and the MLflow store",
    )
    name: str | None = option(
        None,
        "name of the run; one of this name that was broken off goes on [default: date and time]",
    )
    tracking_uri: str | None = option(
        None, "MLflow server [default: MLFLOW_TRACKING_URI, or an SQLite store in --output]"
    )
    experiment: str = option("raygkd", "name of the MLflow experiment")


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """The search over the method's settings (used by ``raygkd tune``)."""

    trials: int = option(8, "number of settings tried", minimum=1)
    max_concurrent: int | None = option(
        None, "most trials at the same time [default: as many as fit]", minimum=1
    )
    searcher: str = option(
        "random",
        "how settings are drawn: each by itself, or by what the trials before scored (Optuna's "
        "tree-structured Parzen estimator)",
        choices=("random", "tpe"),
    )
    scheduler: str = option(
        "asha",
        "which trials are stopped early: those behind at a rung; hyperband: the same with several "
        "grace periods, each for a share of the trials; or none",
        choices=("asha", "hyperband", "none"),
    )
    grace_period: int = option(1, "epochs every trial trains before it can be stopped", minimum=1)
    reduction_factor: int = option(3, "one in this many trials goes on beyond each rung", minimum=2)
    space: str | None = option(
        None,
        "YAML file that replaces the search space, an entry is 'lr: {loguniform: [0.02, 0.2]}'",
    )
    repeat: int = option(
        0,
        "re-train the best settings, the student alone and logit distillation with so many other "
        "seeds, and report mean and spread on the test split",
        minimum=0,
    )


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What is compared (used by ``raygkd compare``)."""

    methods: tuple[str, ...] | None = option(
        None,
        "methods, of those of --method [default: all that suit the images]",
        choices=METHODS.names,
    )
    preset: str | None = option(
        None,
        "in the place of methods: ablation, the parts and settings of ours one by one",
        choices=PRESETS,
    )
    seeds: int = option(
        3, "how many seeds each is trained with: --seed and those after it", minimum=1
    )


SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "model": ModelConfig,
    "method": MethodConfig,
    "optim": OptimConfig,
    "cluster": ClusterConfig,
    "output": OutputConfig,
    "search": SearchConfig,
    "compare": CompareConfig,
}


# section -> what is registered with settings that belong to it
REGISTRIES = {"method": METHODS, "data": DATASETS}
# settings that have options of their own: METHOD.SETTING or DATASET.OPTION -> name of the option
OTHER_NAMES = {
    "voc.years": "years",
    "kd.temperature": "kd_temperature",
    "kd.weight": "kd_weight",
    "dkd.temperature": "kd_temperature",
    **{
        f"graph.{leaf.name}": leaf.name
        for leaf in dataclasses.fields(MethodConfig)
        if leaf.name not in ("method", "own", "kd_temperature", "kd_weight", "baseline_weight")
    },
}
Setting = tuple[str, dataclasses.Field, Any]


def settings() -> dict[str, Setting]:
    """Return every setting: name -> (section, dataclass field, resolved type).

    First those of the sections, then METHOD.SETTING of every registered method.
    """
    return {**option_settings(), **registered_settings()}


def option_settings() -> dict[str, Setting]:
    """Return the settings that have an option of their own."""
    table = {}
    for section, cls in SECTIONS.items():
        hints = typing.get_type_hints(cls)
        for leaf in dataclasses.fields(cls):
            if leaf.metadata:
                table[leaf.name] = (section, leaf, hints[leaf.name])
    return table


def registered_settings() -> dict[str, Setting]:
    """Return the settings that registered entries declare: METHOD.SETTING -> as ``settings``."""
    table = {}
    for section, registry in REGISTRIES.items():
        for owner, cls in registry.settings().items():
            hints = typing.get_type_hints(cls)
            for leaf in dataclasses.fields(cls):
                name = f"{owner}.{leaf.name}"
                if name not in OTHER_NAMES:
                    table[name] = (section, leaf, hints[leaf.name])
    return table


def allowed_choices(leaf: dataclasses.Field) -> tuple[str, ...]:
    """Return the values a setting is limited to; none where it is not limited to a list."""
    choices = leaf.metadata["choices"]
    return tuple(choices() if callable(choices) else choices or ())
