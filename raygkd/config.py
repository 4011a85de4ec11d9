"""One tree of settings for a run: keyword-only dataclasses, YAML in and out, all problems at once.

Every leaf has a name that no other leaf has, so that a setting is called the same on the command
line (``--batch-size``), in a YAML file (``optim: {batch_size: 64}``) and in a search space
(``batch_size: {choice: [32, 64]}``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from raygkd.errors import ConfigError, near
from raygkd.registry import METHOD_GROUP, entry_points

# what is distilled: nothing, what ``raygkd.losses.BASELINES`` has of others', and our graphs
METHODS = (
    "none",
    *("kd", "dkd", "dist", "logit-std"),
    *("fitnet", "at", "sp", "rkd", "pkt", "vid", "ickd"),
    *("fgd", "cwd", "pkd"),
    *("graph", "graph+kd"),
)
PRESETS = ("ablation",)
LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class WorkerRange:
    """How many training processes a run has: as many as there is room for, within limits.

    Attributes:
        least: fewer do not start.
        most: more are never started.
    """

    least: int
    most: int

    @classmethod
    def parse(cls, value: Any) -> WorkerRange:
        """Return the range that a number (2) or a text ("1-4") means.

        Raises:
            ValueError: it is neither.
        """
        least, dash, most = str(value).partition("-")
        return cls(int(least), int(most if dash else least))

    @property
    def is_elastic(self) -> bool:
        """Whether the number may change while a run is under way."""
        return self.least < self.most

    @property
    def plain(self) -> int | str:
        """What ``parse`` takes back."""
        return str(self) if self.is_elastic else self.least

    def __str__(self) -> str:
        return f"{self.least}-{self.most}" if self.least != self.most else str(self.least)


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    group: str | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
) -> Any:
    """Declare a setting: its default, what it means (with its unit), and what is allowed.

    Beside the choices there may be those that other packages have as entry points of a group.
    """
    limits = {"minimum": minimum, "above": above, "maximum": maximum, "below": below}
    return field(
        default=default,
        metadata={"help": help, "choices": choices, "group": group, "limits": limits},
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how they reach the model."""

    dataset: str = option(
        "digits",
        "digits, cifar10, cifar100, imagefolder; for detection digits-voc, voc, coco; or parquet",
    )
    data_dir: str | None = option(None, "folder (or s3://, gs:// path) the data set is read from")
    download: bool = option(
        False, "fetch cifar10, cifar100 or voc into --data-dir when it is not there"
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

    method: str = option("graph", "what is distilled", choices=METHODS, group=METHOD_GROUP)
    levels: tuple[int, ...] | None = option(
        None, "stages whose graphs are matched, 1 is the shallowest [default: all]"
    )
    temperature: float = option(5.0, "attention temperature T of the graph losses", above=0.0)
    dim: int = option(
        8, "spectral dimension d, below the teacher's channels at every level", minimum=1
    )
    spectral_mode: str = option(
        "residual", "form of the spectral loss", choices=("residual", "subspace", "procrustes")
    )
    attention: str = option(
        "outer", "form of the relational attention", choices=("outer", "softmax")
    )
    weights: str = option(
        "shifted", "edge weights of the spectral graph: (1+A)/2 or A", choices=("shifted", "cosine")
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
    alpha: float = option(100.0, "weight of the vertex loss", minimum=0.0)
    beta: float = option(10.0, "weight of the edge loss", minimum=0.0)
    gamma: float = option(1.0, "weight of the spectral loss", minimum=0.0)
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
        f"methods, of {', '.join(METHODS)} [default: all that suit the images]",
        choices=METHODS,
        group=METHOD_GROUP,
    )
    preset: str | None = option(
        None,
        "in the place of methods: ablation, the parts and settings of ours one by one",
        choices=PRESETS,
    )
    seeds: int = option(
        3, "how many seeds each is trained with: --seed and those after it", minimum=1
    )


# of raygkd.models.detectors, which needs torch
DETECTOR_NAME = re.compile(r"[a-z]+_.+_fpn\d*")
# what suits detectors where nothing else is given
_DETECTOR = {
    "optimizer": "adamw",
    "batch_size": 8,
    "warmup_epochs": 0.5,
    "clip_norm": 10.0,
    # a pyramid's maps have no ReLU and are large, most of a channel is the same everywhere, and
    # most positions are background
    "temperature": 10.0,
    "adapter": "plain",
    "centre": True,
    "foreground": 0.5,
    "alpha": 1.0,
    "beta": 1.0,
    "gamma": 1.0,
}
_PHOTOGRAPHS = {
    "teacher": "fasterrcnn_resnet50_fpn",
    "student": "fasterrcnn_resnet18_fpn",
    "teacher_epochs": 20,
    "lr": 1e-4,
}
DATASET_DEFAULTS: dict[str, dict[str, Any]] = {
    # a pair that learns in minutes on a CPU
    "digits-voc": {
        **_DETECTOR,
        "teacher": "fasterrcnn_resnet18_fpn64",
        "student": "fasterrcnn_mobilenet_v3_small_fpn64",
        "epochs": 5,
        "teacher_epochs": 6,
        "lr": 3e-3,
    },
    "voc": {**_DETECTOR, **_PHOTOGRAPHS},
    "coco": {**_DETECTOR, **_PHOTOGRAPHS},
}

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


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run; a ConfigError at construction lists every problem, a line each."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)

    def __post_init__(self) -> None:
        problems = [problem for _, leaf, value in _leaves(self) for problem in _check(leaf, value)]
        problems += _check_together(self)
        if problems:
            raise ConfigError("\n".join(problems))


def _leaves(config: Config) -> Iterator[tuple[str, dataclasses.Field, Any]]:
    for section in SECTIONS:
        part = getattr(config, section)
        for leaf in dataclasses.fields(part):
            yield section, leaf, getattr(part, leaf.name)


def settings() -> dict[str, tuple[str, dataclasses.Field, Any]]:
    """Return every setting: name -> (section, dataclass field, resolved type)."""
    table = {}
    for section, cls in SECTIONS.items():
        hints = typing.get_type_hints(cls)
        for leaf in dataclasses.fields(cls):
            table[leaf.name] = (section, leaf, hints[leaf.name])
    return table


def is_choice(leaf: dataclasses.Field, value: str) -> bool:
    """Return whether a value is one of a setting's choices, or another package's."""
    choices, group = leaf.metadata["choices"], leaf.metadata["group"]
    return value in choices or (group is not None and value in entry_points(group))


def flag(name: str) -> str:
    """Return how a setting is written on the command line."""
    return "--" + name.replace("_", "-")


def _check(leaf: dataclasses.Field, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, WorkerRange):
        values: tuple[Any, ...] = (value.least, value.most)
    else:
        values = value if isinstance(value, tuple) else (value,)
    if any(isinstance(v, float) and not math.isfinite(v) for v in values):
        return [f"{flag(leaf.name)} {value}: must be a finite number"]
    choices = leaf.metadata["choices"]
    for chosen in values if choices else ():
        if not is_choice(leaf, chosen):
            allowed = ", ".join(choices)
            return [
                f"{flag(leaf.name)} {chosen!r}: must be one of {allowed}{near(chosen, choices)}"
            ]
    words = {"minimum": "at least", "above": "above", "maximum": "at most", "below": "below"}
    broken = {
        "minimum": lambda v, bound: v < bound,
        "above": lambda v, bound: v <= bound,
        "maximum": lambda v, bound: v > bound,
        "below": lambda v, bound: v >= bound,
    }
    limits = {kind: bound for kind, bound in leaf.metadata["limits"].items() if bound is not None}
    if any(broken[kind](v, bound) for v in values for kind, bound in limits.items()):
        allowed = " and ".join(f"{words[kind]} {bound:.10g}" for kind, bound in limits.items())
        return [f"{flag(leaf.name)} {value}: must be {allowed}"]
    return []


def _check_together(config: Config) -> list[str]:
    """Return what is wrong between settings that are right by themselves."""
    problems = []
    method, optim, cluster = config.method, config.optim, config.cluster
    if method.levels is not None and (
        not method.levels or len(set(method.levels)) < len(method.levels) or min(method.levels) < 1
    ):
        shown = ",".join(map(str, method.levels))
        problems.append(f"--levels {shown!r}: must be different whole numbers from 1")
    if "graph" in method.method and method.alpha == method.beta == method.gamma == 0:
        problems.append(
            f"--method {method.method} with --alpha, --beta and --gamma all 0 distils no graph: "
            "raise one of them, or use --method none"
        )
    workers = cluster.workers
    if 0 < workers.most < workers.least:
        problems.append(f"--workers {workers}: the first number must not be the larger one")
    elif workers.least > 0 and any(optim.batch_size % n for n in (workers.least, workers.most)):
        problems.append(
            f"--batch-size {optim.batch_size} cannot be split evenly over --workers {workers}: use "
            "a multiple"
        )
    if not set(config.data.years) <= {2007, 2012}:
        shown = ",".join(map(str, config.data.years))
        problems.append(f"--years {shown!r}: must be of 2007 and 2012")
    if 0 < optim.epochs < config.search.grace_period:
        problems.append(
            f"--grace-period {config.search.grace_period}: must be at most --epochs {optim.epochs}"
        )
    if 0 < optim.epochs <= optim.warmup_epochs:
        problems.append(
            f"--warmup-epochs {optim.warmup_epochs}: must be below --epochs {optim.epochs}"
        )
    if optim.seed <= LARGEST_SEED < optim.seed + config.search.repeat:
        problems.append(
            f"--repeat {config.search.repeat}: takes the seeds after --seed {optim.seed}, and the "
            f"largest is {LARGEST_SEED}: lower one of them"
        )
    problems += _comparison_problems(config.compare)
    authority = (config.output.tracking_uri or "").partition("://")[2].partition("/")[0]
    if ":" in authority.rpartition("@")[0]:
        problems.append(
            "--tracking-uri: holds a password, which would be stored with the run: set "
            "MLFLOW_TRACKING_URI, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    name = config.output.name
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        problems.append(
            f"--name {name!r}: must be of letters, digits, '-', '_' and '.', the first a letter or "
            "a digit"
        )
    if not all(0 < m < 1 for m in optim.milestones):
        shown = ",".join(map(str, optim.milestones))
        problems.append(f"--milestones {shown}: must lie between 0 and 1")
    return problems


def _comparison_problems(compare: CompareConfig) -> list[str]:
    methods = compare.methods
    if methods is None:
        return []
    shown = ",".join(methods)
    if not methods or len(set(methods)) < len(methods):
        return [f"--methods {shown!r}: must be different methods"]
    if compare.preset is not None:
        return [f"--methods {shown}: --preset {compare.preset} has its own: leave one of them out"]
    return []


def base_type(kind: Any) -> Any:
    """Return the type of a setting without its None."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return next(option for option in options if option is not type(None))


def coerce(name: str, kind: Any, value: Any) -> Any:
    """Return ``value`` as the type of setting ``name``; ConfigError where it is of another one."""
    if value is None and base_type(kind) is not kind:
        return None
    kind = base_type(kind)
    if kind is WorkerRange:
        with contextlib.suppress(ValueError):
            return value if isinstance(value, WorkerRange) else WorkerRange.parse(value)
        raise ConfigError(f"{flag(name)} {value!r}: must be a number, or two as in 1-4")
    if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(coerce(name, typing.get_args(kind)[0], item) for item in value)
    if kind is float and isinstance(value, str):
        # YAML 1.1 reads 5e-4 as text
        with contextlib.suppress(ValueError):
            return float(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and is_number:
        return float(value)
    if (kind is int and is_number and isinstance(value, int)) or (
        kind in (bool, str) and isinstance(value, kind)
    ):
        return value
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    lists = {int: "a list of whole numbers", float: "a list of numbers", str: "a list of texts"}
    wanted = names.get(kind) or lists[typing.get_args(kind)[0]]
    raise ConfigError(f"{flag(name)} {value!r}: must be {wanted}")


def check_keys(tree: Mapping[str, Any], *, where: str) -> None:
    """Refuse unknown sections and settings, with the near ones, all in one ConfigError.

    Args:
        tree: section -> setting -> value.
        where: the file, named in errors.
    """
    problems = _key_problems(tree, where)
    if problems:
        raise ConfigError("\n".join(problems))


def _key_problems(tree: Mapping[str, Any], where: str) -> list[str]:
    problems: list[str] = []
    known = settings()
    for section, leaves in tree.items():
        if section not in SECTIONS:
            hint = near(str(section), [*SECTIONS, *known])
            if section in known:
                hint = f" (it belongs under '{known[section][0]}:')"
            sections = ", ".join(SECTIONS)
            problems.append(f"{where}: unknown key {section!r}{hint} (sections: {sections})")
        elif not isinstance(leaves, Mapping):
            problems.append(f"{where}: {section!r} must hold settings, not {leaves!r}")
        else:
            problems += [
                f"{where}: unknown key '{section}.{name}'{near(str(name), known)}"
                for name in leaves
                if name not in known or known[name][0] != section
            ]
    return problems


def from_mapping(tree: Mapping[str, Any], *, where: str = "configuration") -> Config:
    """Build a Config of a tree of plain values, as YAML gives it.

    Args:
        tree: section -> setting -> value; what is left out has its default, which for some
            settings is the data set's own (``DATASET_DEFAULTS``), or what suits detectors where one
            is named.
        where: the file, named in errors.

    Raises:
        ConfigError: an unknown section or setting (with the near ones) or a value that is not
            allowed; all problems in one error, a line each.
    """
    problems = _key_problems(tree, where)
    beyond_limits: list[str] = []
    defaults = _defaults(tree)
    parts: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for name, (section, leaf, kind) in settings().items():
        leaves = tree.get(section)
        if not isinstance(leaves, Mapping) or name not in leaves:
            if name in defaults:
                parts[section][name] = defaults[name]
            continue
        try:
            parts[section][name] = coerce(name, kind, leaves[name])
        except ConfigError as error:
            problems.append(f"{where}: {error}")
        else:
            beyond_limits += _check(leaf, parts[section][name])
    if problems:
        # no checks between settings: they would speak of defaults in the place of what is wrong
        raise ConfigError("\n".join(problems + beyond_limits))
    return Config(**{section: SECTIONS[section](**leaves) for section, leaves in parts.items()})


def _defaults(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the defaults that hang on the data set, or where it is of any task on the models.

    Values that are no names are left to the checks that follow.
    """
    dataset, *models = (
        str(leaves.get(name)) if isinstance(leaves := tree.get(section), Mapping) else ""
        for section, name in (("data", "dataset"), ("model", "student"), ("model", "teacher"))
    )
    if dataset in DATASET_DEFAULTS:
        return DATASET_DEFAULTS[dataset]
    is_detection = any(map(DETECTOR_NAME.fullmatch, models))
    return {**_DETECTOR, "lr": _PHOTOGRAPHS["lr"]} if is_detection else {}


def to_mapping(config: Config) -> dict[str, dict[str, Any]]:
    """Return the tree of plain values that ``from_mapping`` takes back."""
    tree: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for section, leaf, value in _leaves(config):
        tree[section][leaf.name] = _plain(value)
    return tree


def _plain(value: Any) -> Any:
    """Return a setting as YAML has it."""
    if isinstance(value, WorkerRange):
        return value.plain
    return list(value) if isinstance(value, tuple) else value


def with_settings(config: Config, values: Mapping[str, Any]) -> Config:
    """Return ``config`` with the named settings replaced; unknown names and wrong values raise."""
    known = settings()
    unknown = [
        f"unknown setting {name!r}{near(name, known)}" for name in values if name not in known
    ]
    if unknown:
        raise ConfigError("\n".join(unknown))
    tree = to_mapping(config)
    for name, value in values.items():
        tree[known[name][0]][name] = value
    return from_mapping(tree)


def given(config: Config) -> set[str]:
    """Return the names of the settings that are not what they are by default."""
    tree: dict[str, Any] = {"data": {"dataset": config.data.dataset}}
    models = from_mapping(tree).model
    tree["model"] = {"student": config.model.student, "teacher": config.model.teacher}
    leaves = zip(_leaves(config), _leaves(from_mapping(tree)), strict=True)
    names = {leaf.name for (_, leaf, value), (_, _, default) in leaves if value != default}
    return names | {name for name in tree["model"] if tree["model"][name] != getattr(models, name)}


def to_yaml(config: Config) -> str:
    """Return the YAML text of a configuration; ``--config`` takes it back."""
    import yaml

    return yaml.safe_dump(to_mapping(config), sort_keys=False)


def from_yaml(text: str, *, where: str) -> Config:
    """Build a Config of YAML text; ConfigError names ``where`` and the line of a syntax error."""
    return from_mapping(yaml_mapping(text, where=where), where=where)


def yaml_mapping(text: str | bytes, *, where: str) -> dict[str, Any]:
    """Return the mapping a YAML text holds; ConfigError if it is no YAML or no mapping."""
    import yaml

    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
            mark = error.problem_mark
            reason = f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
        raise ConfigError(f"{where}: not valid YAML: {reason}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: must hold keys and values, not {type(tree).__name__}")
    return tree


def fingerprint(values: Any) -> str:
    """Return 16 hexadecimal digits that stand for plain values, as JSON holds them."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
