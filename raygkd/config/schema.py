"""Every setting of a run: its section, default, help and limits.

The name of each setting is unique, so that it is the same on the command line
(``--batch-size``), in a YAML file (``optim: {batch_size: 64}``) and in a search space
(``batch_size: {choice: [32, 64]}``). Settings that a registered method or data set declares are
called METHOD.SETTING or DATASET.OPTION (``--set dkd.beta=8``, ``method: {dkd: {beta: 8}}``,
``dkd.beta: {choice: [4, 8]}``).
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raygkd.config.recipe import RecipeConfig
from raygkd.config.search import CompareConfig, SearchConfig, TrainConfig
from raygkd.config.values import LevelPair, WorkerRange
from raygkd.registry import DATASETS, METHODS, METRICS, either, option

_WEIGHTS = (
    "pretrained, none, a weights file, or a model file written by raygkd; for a detector: none, a "
    "file, imagenet (the backbone only), or coco [default: pretrained if the model's library has "
    "weights, else none]"
)
LARGEST_SEED = 2**32 - 1
# pixels
LARGEST_IMAGE = 4096
MOST_EPOCHS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data set, its splits, and how images are prepared."""

    dataset: str = option(
        "digits",
        lambda: (
            f"data set: {', '.join(DATASETS.names())}, parquet, or auto: detected from --data-dir, "
            "and the default if that is given"
        ),
    )
    data_dir: str | None = option(None, "folder of the data set; s3:// and gs:// paths work")
    unlabelled: str | None = option(
        None,
        "images without labels: a folder with images at any depth, or Parquet, whose labels are "
        "ignored; alone, the student learns from its teacher without labels; beside a labelled "
        "data set, each training step has a share of both; s3:// and gs:// paths work for Parquet",
    )
    unlabelled_share: float = option(
        0.5,
        "share of each batch that has no labels, if there are images without labels; an epoch is "
        "one pass over the set that takes more steps, and the other is repeated; 1: labelled "
        "images serve for validation only; 0: images without labels are not used",
        minimum=0.0,
        maximum=1.0,
    )
    download: bool = option(
        False,
        lambda: (
            f"download {either(DATASETS.names_with('can_fetch'))} into --data-dir if it is missing"
        ),
    )
    years: tuple[int, ...] = option(
        (2007, 2012), "voc: years whose trainval images are used for training"
    )
    classes: tuple[str, ...] | None = option(
        None, "keep only boxes of these classes [default: all]"
    )
    strict: bool = option(False, "stop at faulty annotations instead of dropping them")
    val_fraction: float = option(
        0.1,
        "fraction of the training images held out for validation if the data set has no "
        "validation split",
        above=0.0,
        below=1.0,
    )
    test_fraction: float = option(
        0.1, "fraction held out for testing if the data set has no test split", above=0.0, below=1.0
    )
    limit_train: int | None = option(
        None, "maximum number of training images [default: all]", minimum=1
    )
    image_size: int | None = option(
        None,
        "side of the square model input, in pixels [default: that of the data set, else 224; for "
        "detection that of the data set, at most 640]",
        minimum=4,
        maximum=LARGEST_IMAGE,
    )
    teacher_image_size: int | None = option(
        None,
        "side of the teacher's square input in classification, in pixels [default: that of its "
        "file or of its pretrained weights, else --image-size]",
        minimum=4,
        maximum=LARGEST_IMAGE,
    )
    augment: str = option(
        "auto",
        "augmentation of the training images; auto: depends on the data set",
        choices=("auto", "none", "crop", "crop-flip", "resized-crop", "jitter", "jitter-flip"),
    )
    score: str = option(
        "auto",
        "metric that models are ranked by; auto: accuracy for classifiers, and for detectors map "
        "on coco and map50 on other data sets; without labels agreement with the teacher's classes "
        "or, if the student has none, cka, the similarity of its features to the teacher's; knn: "
        "accuracy of a vote of the nearest labelled training images by features",
        choices=lambda: ("auto", *METRICS.names(), "map", "map50", "knn", "agreement", "cka"),
    )
    skip_bad: bool = option(False, "skip and count unreadable images instead of stopping")
    cache_mb: int = option(
        1024,
        "shared memory for decoded images, in MiB; data sets that do not fit are streamed",
        minimum=0,
    )
    # explicitly set options of registered data sets: DATASET.OPTION -> value
    own: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Teacher and student."""

    teacher: str = option(
        "resnet20",
        "teacher: a built-in name, torchvision:NAME, timm:NAME, hf:NAME, open_clip:NAME, "
        "FILE.py:FUNCTION, or a model file written by raygkd",
    )
    student: str = option("resnet8", "student: a name, as for --teacher")
    teacher_epochs: int = option(
        20, "training epochs of the teacher if --teacher is a name", minimum=1, maximum=MOST_EPOCHS
    )
    teacher_mode: str = option(
        "auto",
        "how the teacher is used; as-is: unchanged; probe: train its last layer on features that "
        "its frozen backbone computes once; finetune: train all of it, the backbone with a tenth "
        "of the learning rate; train: train all of it at one learning rate; auto: as-is if its "
        "weights have the classes of the images, probe if they have others, train if they are "
        "random; features: use only its feature maps, whatever its classes",
        choices=("auto", "as-is", "probe", "finetune", "train", "features"),
    )
    teacher_weights: str | None = option(
        None,
        f"initial weights of the teacher: {_WEIGHTS}",
    )
    teacher_classes: str | None = option(
        None,
        "file with the class names of the teacher's weights in the order of their logits, one per "
        "line or a JSON list; the logits of the images' classes are selected by name [default: "
        "the names that come with the weights]",
    )
    class_names: str | None = option(
        None,
        "file with the names of the images' classes in texts for an image-text teacher, in their "
        "order, one per line or a JSON list [default: the images' class names]",
    )
    prompts: str | None = option(
        None,
        "file with the texts for an image-text teacher, one per line, each with {} for a class "
        "name; the logits of several are averaged, weighted by their confidence [default: a photo "
        "of a {}.]",
    )
    student_weights: str | None = option(
        None,
        f"initial weights of the student: {_WEIGHTS}",
    )
    inherit: bool | None = option(
        None,
        "initialise a detector's neck and head from the teacher's where shapes agree [default: yes "
        "when distilling, unless --student-weights is a file]",
    )


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """The distillation method and its settings (see raygkd.losses)."""

    method: str = option("graph", "distillation method", choices=METHODS.names)
    levels: tuple[LevelPair, ...] | None = option(
        None,
        "levels of the student to match (1 is the shallowest), or pairs student:teacher such as "
        "2:1,4:3 [default: all, each with the teacher's level nearest in resolution and depth]",
    )
    temperature: float = option(
        20.0,
        "attention temperature T of the graph losses, in units of the map's mean magnitude; at 20 "
        "all positions and channels have nearly the same weight",
        above=0.0,
    )
    dim: int = option(
        8,
        "spectral dimension d; must be smaller than the teacher's channel count at every level",
        minimum=1,
    )
    graphs: str = option(
        "batch",
        "build one graph of channels per batch, or one per image",
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
        "1x1 convolution from the student's channels to the teacher's: plain, or followed by batch "
        "normalisation; plain diverges when the loss weights are large",
        choices=("plain", "normalised"),
    )
    centre: bool = option(
        False,
        "subtract each channel's mean over the positions first: correlations instead of cosines",
    )
    weights_unit: str = option(
        "gradient",
        "unit of --alpha, --beta, --gamma and --baseline-weight; gradient: at 1 a term "
        "changes the student as much as the labels do, measured over the first steps; loss: the "
        "weights multiply the losses, and --temperature is in units of the features",
        choices=("gradient", "loss"),
    )
    alpha: float = option(3.0, "weight of the vertex loss", minimum=0.0)
    beta: float = option(0.0, "weight of the edge loss", minimum=0.0)
    gamma: float = option(0.0, "weight of the spectral loss", minimum=0.0)
    fade: str = option(
        "lead",
        "how the weights of the graph losses change over the epochs; lead: full until the student "
        "has three quarters of the teacher's validation accuracy, then falling linearly to 0 when "
        "it has caught up, and constant without labels; none: constant",
        choices=("lead", "none"),
    )
    foreground: float | None = option(
        None,
        "fraction of the vertex loss inside object boxes [default: by area]",
        above=0.0,
        below=1.0,
    )
    kd_temperature: float = option(
        4.0, "temperature of the logits in kd, graph+kd and dkd", above=0.0
    )
    kd_weight: float = option(
        0.9, "weight w of KD in kd and graph+kd: (1-w) CE + w KD", above=0.0, maximum=1.0
    )
    baseline_weight: float | None = option(
        None,
        "weight of the loss of methods other than graph and kd [default: as published]",
        above=0.0,
    )
    task_weight: float | None = option(
        None,
        "weight of the labels' loss when there is a teacher; 0: learn only from the teacher, with "
        "a gradient of norm 1 instead of the labels' as the unit of the weights [default: 1-w in "
        "kd and graph+kd, else as published]",
        minimum=0.0,
    )
    # explicitly set settings of registered methods: METHOD.SETTING -> value
    own: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser and its schedule."""

    epochs: int = option(10, "passes over the training images", minimum=1, maximum=MOST_EPOCHS)
    batch_size: int = option(64, "images per batch, summed over all workers", minimum=1)
    accumulate: int = option(
        1, "batches per optimiser step; their gradients are averaged", minimum=1
    )
    patience: int | None = option(
        None,
        "stop after this many epochs without a better validation score [default: train all epochs]",
        minimum=1,
    )
    optimizer: str = option("sgd", "optimiser", choices=("sgd", "adamw"))
    lr: float = option(0.05, "peak learning rate", above=0.0)
    momentum: float = option(0.9, "momentum of SGD, first beta of AdamW", minimum=0.0, below=1.0)
    weight_decay: float = option(5e-4, "weight decay", minimum=0.0)
    schedule: str = option(
        "cosine", "learning rate schedule", choices=("cosine", "multistep", "constant")
    )
    warmup_epochs: float = option(0.0, "epochs of linear learning rate warm-up", minimum=0.0)
    milestones: tuple[float, ...] = option(
        (0.625, 0.75, 0.875),
        "multistep: fractions of the epochs after which the learning rate drops",
    )
    lr_decay: float = option(0.1, "multistep: factor of each drop", above=0.0, below=1.0)
    backbone_lr_factor: float = option(
        1.0,
        "learning rate of the student except for its last layer, as a share of --lr; below 1 "
        "suits pretrained weights",
        minimum=0.0,
        maximum=1.0,
    )
    layer_decay: float = option(
        1.0,
        "learning rate of each layer before the last, as a share of the next layer's",
        above=0.0,
        maximum=1.0,
    )
    freeze_epochs: int = option(
        0,
        "number of epochs, at the start, that train only the student's last layer and the adapters",
        minimum=0,
    )
    freeze_batch_norm: bool = option(
        False, "keep the batch normalisation statistics of the student's initial weights"
    )
    clip_norm: float | None = option(
        None, "maximum norm of the gradient [default: no clipping]", above=0.0
    )
    amp: str = option(
        "auto",
        "mixed precision; auto: bf16 on CUDA, none on CPUs",
        choices=("auto", "none", "bf16", "fp16"),
    )
    compile: bool = option(False, "compile the models with torch.compile")
    seed: int = option(
        0,
        "seed of the initial weights, data order and augmentation",
        minimum=0,
        maximum=LARGEST_SEED,
    )


# of a CPU or GPU; with smaller ones there would be thousands of processes
LEAST_SHARE = 0.01


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Resources of a run on the Ray cluster."""

    workers: WorkerRange = option(
        WorkerRange(1, 1),
        "training processes of a run (DDP if more than 1); A-B: as many as fit, at most B, and at "
        "least A after nodes are lost",
        minimum=1,
    )
    gpus_per_worker: float = option(0.0, "GPUs per training process", minimum=0.0)
    cpus_per_worker: float | None = option(
        None,
        "CPUs per training process [default: 1 in a search, else a share of the machine]",
        minimum=LEAST_SHARE,
    )
    max_failures: int = option(
        3, "restarts allowed per run or trial after lost workers or nodes", minimum=0
    )
    teacher_cache_mb: int = option(
        0,
        "cache the teacher's outputs for the training images in up to this many MiB of shared "
        "memory, for all trials and epochs; 0: no cache",
        minimum=0,
    )
    address: str | None = option(
        None, "address of a running Ray cluster [default: start a local one]"
    )
    wait_minutes: float = option(
        0.0,
        "minutes to wait for an autoscaling cluster to add nodes if there is no room; a search "
        "requests room for --max-concurrent trials",
        minimum=0.0,
    )


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Where results are stored."""

    output: str = option(
        "raygkd-output",
        "folder for data, teachers, checkpoints and the MLflow store; s3:// and gs:// paths work",
    )
    name: str | None = option(
        None,
        "name of the run; an interrupted run of this name is resumed [default: date and time]",
    )
    tracking_uri: str | None = option(
        None, "MLflow server [default: MLFLOW_TRACKING_URI, or an SQLite store in --output]"
    )
    experiment: str = option("raygkd", "name of the MLflow experiment")


SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "model": ModelConfig,
    "method": MethodConfig,
    "optim": OptimConfig,
    "recipe": RecipeConfig,
    "cluster": ClusterConfig,
    "output": OutputConfig,
    "train": TrainConfig,
    "search": SearchConfig,
    "compare": CompareConfig,
}


# section -> registry whose entries declare settings in it
REGISTRIES = {"method": METHODS, "data": DATASETS}
# settings with a command line option of their own: METHOD.SETTING or DATASET.OPTION -> its name
OTHER_NAMES = {
    "voc.years": "years",
    "kd.temperature": "kd_temperature",
    "kd.weight": "kd_weight",
    "dkd.temperature": "kd_temperature",
    "graph-metrics.graphs": "graphs",
    **{
        f"graph.{leaf.name}": leaf.name
        for leaf in dataclasses.fields(MethodConfig)
        if leaf.name
        not in ("method", "own", "kd_temperature", "kd_weight", "baseline_weight", "task_weight")
    },
}
Setting = tuple[str, dataclasses.Field, Any]


def settings() -> dict[str, Setting]:
    """Return every setting: name -> (section, dataclass field, resolved type).

    Those of the sections come first, then METHOD.SETTING and DATASET.OPTION of registered entries.
    """
    return {**option_settings(), **registered_settings()}


def option_settings() -> dict[str, Setting]:
    """Return the settings that have a command line option of their own."""
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
    """Return the allowed values of a setting; empty if any value is allowed."""
    choices = leaf.metadata["choices"]
    return tuple(choices() if callable(choices) else choices or ())
