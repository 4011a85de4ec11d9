"""Configuration -> core objects.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raygkd.config import (
    METHODS,
    Config,
    MethodConfig,
    OptimConfig,
    settings,
    to_yaml,
    with_settings,
)
from raygkd.data.box_transforms import build_box_transform
from raygkd.data.boxes import Boxes
from raygkd.data.transforms import build_transform
from raygkd.engine import (
    BaselineTerm,
    Classification,
    ClassifierObjective,
    Detection,
    DetectorObjective,
    Objective,
    Recall,
    Task,
    Teacher,
    TeacherStore,
    Training,
)
from raygkd.engine.loop import Stream
from raygkd.engine.schedule import lr_factor
from raygkd.errors import ConfigError
from raygkd.losses import BASELINES, GraphDistillationLoss, baseline_loss
from raygkd.models import (
    MOST_DETECTIONS,
    TORCHVISION_WEIGHTS,
    Detector,
    ModelFile,
    build_from_file,
    build_model,
    check_image_size,
    check_levels,
    classifier_names,
    feature_shapes,
    inherit,
    inheritable,
    is_classifier,
    is_detector,
    load_weights,
    stage_modules,
    torchvision_file,
)


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """What models must know of the images.

    Attributes:
        class_names: the classes, in the order of the labels.
        image_size: height and width of the model input in pixels.
        mean, std: per channel, of pixels scaled to 0..1.
        task: "classification" or "detection".
        score: what models are ranked by: "accuracy", "map" or "map50".
        augment: kind of the training transform, and with it how an image is brought to the model's
            size; "auto" where it is not known.
    """

    class_names: tuple[str, ...]
    image_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    task: str = "classification"
    score: str = "accuracy"
    augment: str = "auto"


def build_task(spec: ImageSpec, boxes: Boxes | None) -> Task:
    """Return what is learnt from images.

    Args:
        spec: the images' classes and task.
        boxes: of every image of the table, for detection.
    """
    if spec.task == "classification":
        return Classification(len(spec.class_names))
    assert boxes is not None
    return Detection(len(spec.class_names), boxes, spec.score)


def new_model(name: str, spec: ImageSpec) -> nn.Module:
    """Return an untrained model for images.

    Raises:
        ConfigError: an unknown name, or a model for another task.
    """
    check_kind(name, spec.task)
    return build_model(name, len(spec.class_names), spec.image_size)


def start_from_weights(config: Config, student: nn.Module) -> None:
    """Load into a detector the weights that its training starts from, where there are any.

    Raises:
        ConfigError: weights that torchvision does not have.
        DataError: weights that cannot be had or do not fit.
    """
    name, weights = config.model.student, config.model.student_weights
    if weights is not None and isinstance(student, Detector):
        load_weights(
            student, torchvision_file(name, weights) if weights in TORCHVISION_WEIGHTS else weights
        )


def check_kind(name: str, task: str) -> None:
    """Refuse a classifier for detection, or the other way round; an unknown name is neither.

    Raises:
        ConfigError: the model is for another task than the images.
    """
    if is_detector(name) and task == "classification":
        raise ConfigError(
            f"{name} is a detector, and the images have labels but no boxes: choose a classifier "
            "such as resnet8"
        )
    if is_classifier(name) and task == "detection":
        raise ConfigError(
            f"{name} is a classifier, and the images have boxes: choose a detector such as "
            "retinanet_resnet18_fpn"
        )


def normaliser(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Return the function of images (B, C, H, W) in 0..1 to (image - mean) / std."""
    mean_1C11 = torch.tensor(mean, device=device).view(1, -1, 1, 1)
    std_1C11 = torch.tensor(std, device=device).view(1, -1, 1, 1)
    return lambda images_BCHW: (images_BCHW - mean_1C11) / std_1C11


def check_settings(config: Config, task: str) -> None:
    """Refuse settings that the images' task does not know.

    Raises:
        ConfigError: a method of the other task or an image size it does not take, random changes of
            the other task, or settings of detectors for classifiers.
    """
    size, augment = config.data.image_size, config.data.augment
    method = config.method.method
    if not suits(method, task):
        others = [name for name in METHODS if suits(name, task)]
        raise ConfigError(
            f"--method {method}: is not for {task}, which these images are for (allowed: "
            f"{', '.join(others)})"
        )
    if task == "detection":
        if size is not None:
            check_image_size(size)
        if augment != "auto":
            build_box_transform(augment, size or 32, train=True, most=1)
    else:
        if augment != "auto":
            build_transform(augment, size or 32, train=True)
        # with a detector it is a default, and the model is refused elsewhere
        is_default = any(map(is_detector, (config.model.student, config.model.teacher)))
        given = {
            "--score": config.data.score != "auto",
            "--foreground": config.method.foreground and not is_default,
            "--inherit": config.model.inherit,
            "--teacher-weights": config.model.teacher_weights,
            "--student-weights": config.model.student_weights,
        }
        for flag, value in given.items():
            if value:
                raise ConfigError(f"{flag}: is for detectors, and these images have no boxes")


def suits(method: str, task: str) -> bool:
    """Return whether a method is for the images of a task."""
    known = baseline_of(method)
    return known is None or BASELINES.get(known).task == task


def baseline_of(method: str) -> str | None:
    """Return the name of the baseline whose loss is a part of a method; None if there is none."""
    if method == "graph+kd":
        return "kd"
    return method if method in BASELINES.names() else None


def is_model_file(teacher: str) -> bool:
    """Return whether ``--teacher`` means a file: it exists, or looks like a path."""
    known = teacher in classifier_names() or is_detector(teacher)
    if known or teacher.startswith("torchvision:"):
        return False
    return Path(teacher).exists() or "/" in teacher or teacher.endswith(".pt")


def teacher_alone(config: Config) -> Config:
    """Return the configuration that trains the teacher's model in the student's place."""
    return with_settings(
        config,
        {
            "student": config.model.teacher,
            "student_weights": config.model.teacher_weights,
            "inherit": False,
            "method": "none",
            "levels": None,
        },
    )


def teacher_training(config: Config) -> Config:
    """Return the configuration that trains the teacher of a run by itself.

    Raises:
        ConfigError: the warm-up is too long for it.
    """
    if config.optim.warmup_epochs >= config.model.teacher_epochs:
        raise ConfigError(
            f"--warmup-epochs {config.optim.warmup_epochs}: the teacher is trained with it too, so "
            f"it must be below --teacher-epochs {config.model.teacher_epochs}"
        )
    # the grace period is the search's, and may be longer than the teacher's training
    return with_settings(
        teacher_alone(config), {"epochs": config.model.teacher_epochs, "grace_period": 1}
    )


def student_alone(config: Config, params: Mapping[str, Any]) -> Config:
    """Return a trial without its teacher: the control that its student is held to.

    Args:
        config: of the search.
        params: the trial's settings, whose learning rate the control has too.
    """
    return with_settings(config, without_teacher(params))


def without_teacher(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of ``student_alone``."""
    return {**params, "method": "none", "inherit": False}


def logit_baseline(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of plain logit distillation that a trial is held to.

    Args:
        params: the trial's settings, whose optimiser the baseline has too; what is distilled, and
            how, is the default.
    """
    known = settings()
    optim = {name: value for name, value in params.items() if known[name][0] == "optim"}
    return {
        **optim,
        "method": "kd",
        "kd_temperature": MethodConfig.kd_temperature,
        "kd_weight": MethodConfig.kd_weight,
    }


def check_teacher(teacher: ModelFile, spec: ImageSpec) -> None:
    """Refuse a teacher of other classes, or for another task.

    Raises:
        ConfigError: it is for another task, or its classes are not the data's, in the same order.
    """
    check_kind(teacher.name, spec.task)
    check_classes(teacher.class_names, spec, "train a teacher on this data with 'raygkd teacher'")


def check_classes(class_names: tuple[str, ...], spec: ImageSpec, advice: str) -> None:
    """Refuse a model of other classes than the images'.

    Args:
        class_names: of the model.
        spec: of the images.
        advice: what to do, for the message.

    Raises:
        ConfigError: they are not the same, in the same order.
    """
    if class_names != spec.class_names:
        known, wanted = (
            f"{len(names)} classes ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
            for names in (class_names, spec.class_names)
        )
        raise ConfigError(f"it knows {known} but the data has {wanted}: {advice}")


def shared_levels(config: Config, teacher: nn.Module, student: nn.Module) -> tuple[int, ...]:
    """Return the levels that both models have.

    Raises:
        ConfigError: there are none.
    """
    shared = sorted(set(stage_modules(teacher)) & set(stage_modules(student)))
    if not shared:
        raise ConfigError(
            f"teacher {config.model.teacher} and student {config.model.student} have no level in "
            "common: choose models whose pyramids overlap"
        )
    return tuple(shared)


def chosen_levels(config: Config, teacher: nn.Module, student: nn.Module) -> tuple[int, ...]:
    """Return the levels a run matches: ``--levels``, or those that the method uses by itself.

    Raises:
        ConfigError: a level that one of the models lacks, or none that both have.
    """
    shared = shared_levels(config, teacher, student)
    levels = config.method.levels
    if levels is None:
        method = config.method.method
        levels = BASELINES.get(method).levels_of(shared) if method in BASELINES.names() else shared
    check_levels(levels, teacher, f"teacher {config.model.teacher}")
    check_levels(levels, student, f"student {config.model.student}")
    return levels


def build_graph_loss(
    config: Config, teacher: nn.Module, student: nn.Module, image_size: tuple[int, int]
) -> GraphDistillationLoss:
    """Return the graph loss between two models on images of one size.

    Raises:
        ConfigError: unknown levels, or a spectral dimension too large for a level.
    """
    method = config.method
    levels = chosen_levels(config, teacher, student)
    return GraphDistillationLoss(
        feature_shapes(student, levels, image_size),
        feature_shapes(teacher, levels, image_size),
        temperature=method.temperature,
        dim=method.dim,
        alpha=method.alpha,
        beta=method.beta,
        gamma=method.gamma,
        mode=method.spectral_mode,
        attention=method.attention,
        weights=method.weights,
        adapter=method.adapter,
        centre=method.centre,
        foreground=method.foreground,
        canvas=image_size[0],
    )


def build_baseline(
    config: Config, teacher: nn.Module, student: nn.Module, image_size: tuple[int, int]
) -> tuple[nn.Module, BaselineTerm]:
    """Return the loss of another method between two models, and how it enters the total.

    Raises:
        ConfigError: unknown levels.
    """
    method = config.method
    name = baseline_of(method.method)
    assert name is not None
    known = BASELINES.get(name)
    settings: dict[str, Any] = {}
    if name in ("kd", "dkd"):
        settings["temperature"] = method.kd_temperature
    if known.reads == "features":
        levels = chosen_levels(config, teacher, student)
        settings["levels"] = levels
        settings["student_shapes"] = feature_shapes(student, levels, image_size)
        settings["teacher_shapes"] = feature_shapes(teacher, levels, image_size)
    two_stage = isinstance(student, Detector) and student.is_two_stage
    loss = baseline_loss(name, canvas=image_size[0], two_stage=two_stage, **settings)
    weight, task_weight = loss.weight, known.task_weight
    if name == "kd":
        weight, task_weight = method.kd_weight, 1.0 - method.kd_weight
    elif method.baseline_weight is not None:
        weight = method.baseline_weight
    term = BaselineTerm(
        name=name,
        weight=weight,
        task_weight=task_weight,
        ramp=known.ramp,
        reads_logits=known.reads == "logits",
    )
    return loss, term


def level_shapes(
    config: Config, teacher: nn.Module, spec: ImageSpec
) -> dict[int, tuple[int, int, int]]:
    """Return level -> (C, H, W) of the teacher, of all levels that both models have."""
    student = new_model(config.model.student, spec)
    every = with_settings(config, {"levels": None})
    return feature_shapes(teacher, chosen_levels(every, teacher, student), spec.image_size)


def uses_teacher(config: Config) -> bool:
    """Return whether a run needs a teacher, to learn from or to start from."""
    return distils(config) or bool(config.model.inherit)


def distils(config: Config) -> bool:
    """Return whether a run's student learns from a teacher."""
    return config.method.method != "none"


def start_from_teacher(config: Config, student: nn.Module, teacher: nn.Module) -> list[str]:
    """Copy the teacher's neck and heads into a detector as far as the settings tell.

    Returns:
        The paths of the modules copied, none for a classifier.

    Raises:
        ConfigError: it is to inherit, and nothing fits.
    """
    if not isinstance(student, Detector) or not isinstance(teacher, Detector):
        return []
    wanted = config.model.inherit
    if wanted is None:
        nothing_else = config.model.student_weights in (None, "imagenet")
        wanted = distils(config) and nothing_else and bool(inheritable(student, teacher))
    return inherit(student, teacher) if wanted else []


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype of autocast for ``--amp`` on a device, or None for full precision."""
    if amp == "auto":
        amp = "bf16" if device.type == "cuda" else "none"
    return {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def build_training(
    config: Config,
    *,
    spec: ImageSpec,
    teacher_file: ModelFile | None,
    stream: Stream,
    device: torch.device,
    rank: int = 0,
    parallel: Callable[[nn.Module], nn.Module] = lambda module: module,
    begun: float | None = None,
    teacher_store: TeacherStore | None = None,
) -> Training:
    """Return a run of one rank, ready for its first epoch.

    Args:
        config: the settings.
        spec: the images' classes, size and normalisation.
        teacher_file: the teacher; None where the method needs none.
        stream: the rank's images.
        device: where to train.
        rank: of this process.
        parallel: wraps the objective for several ranks (DDP).
        begun: when its preparation began, as ``time.perf_counter`` tells it; None for now.
        teacher_store: what is known of the teacher already; None to ask it every time.
    """
    begun = time.perf_counter() if begun is None else begun
    optim = config.optim
    objective, teacher_model = _build_models(config, spec, teacher_file, device, teacher_store)
    optimizer = build_optimizer(optim, objective)
    amp = amp_dtype(optim.amp, device)
    normalise = normaliser(spec.mean, spec.std, device)
    recall = None
    if teacher_model is not None and teacher_store is not None:
        recall = Recall(teacher_model, teacher_store, objective)
    teacher_side = teacher_file if teacher_file is not None else spec
    return Training(
        task=build_task(spec, stream.boxes),
        objective=objective,
        parallel=parallel(objective),
        teacher=teacher_model,
        stream=stream,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            functools.partial(lr_factor, steps_per_epoch=stream.steps_per_epoch, optim=optim),
        ),
        scaler=torch.amp.GradScaler(device.type, enabled=amp == torch.float16),
        normalise=normalise,
        teacher_normalise=normaliser(teacher_side.mean, teacher_side.std, device),
        device=device,
        epochs=optim.epochs,
        seed=optim.seed,
        recall=recall,
        rank=rank,
        clip_norm=optim.clip_norm,
        amp=amp,
        config=to_yaml(config),
        begun=begun,
    )


def build_optimizer(optim: OptimConfig, module: nn.Module) -> torch.optim.Optimizer:
    """Return the optimiser of a module's parameters."""
    if optim.optimizer == "adamw":
        return torch.optim.AdamW(
            module.parameters(),
            lr=optim.lr,
            betas=(optim.momentum, 0.999),
            weight_decay=optim.weight_decay,
        )
    return torch.optim.SGD(
        module.parameters(),
        lr=optim.lr,
        momentum=optim.momentum,
        weight_decay=optim.weight_decay,
    )


def build_objective(config: Config, spec: ImageSpec, teacher: nn.Module | None) -> Objective:
    """Return the student as its training begins, with its losses and their adapters, on the CPU.

    Args:
        config: the settings.
        spec: the images' classes and size.
        teacher: the model to learn from or to start from; None where the run needs none.

    Raises:
        ConfigError: levels, a dimension or a package that the method cannot have.
    """
    torch.manual_seed(config.optim.seed)
    student = new_model(config.model.student, spec)
    start_from_weights(config, student)
    method = config.method.method
    parts: dict[str, Any] = {}
    if teacher is not None:
        start_from_teacher(config, student, teacher)
    if teacher is not None and "graph" in method:
        parts["levels"] = chosen_levels(config, teacher, student)
        parts["graph"] = build_graph_loss(config, teacher, student, spec.image_size)
    if teacher is not None and baseline_of(method) is not None:
        baseline, term = build_baseline(config, teacher, student, spec.image_size)
        parts |= {"baseline": baseline, "baseline_term": term}
        if not term.reads_logits:
            parts["levels"] = chosen_levels(config, teacher, student)
    kind = DetectorObjective if isinstance(student, Detector) else ClassifierObjective
    return kind(student, **parts)


def _build_models(
    config: Config,
    spec: ImageSpec,
    teacher_file: ModelFile | None,
    device: torch.device,
    store: TeacherStore | None,
) -> tuple[Objective, Teacher | None]:
    teacher_model = None
    if uses_teacher(config):
        if teacher_file is None:
            raise ValueError("this run needs a teacher")
        teacher_model = build_from_file(teacher_file)
    objective = build_objective(config, spec, teacher_model)
    student = objective.student
    objective.to(device)
    teacher = None
    if teacher_model is not None and distils(config):
        heard = set(objective.levels)
        if store is not None and heard:
            # what other trials may want is kept with what this one does
            others = with_settings(config, {"levels": store.levels, "method": "graph"})
            heard |= set(chosen_levels(others, teacher_model, student))
        teacher = Teacher(teacher_model.to(device), sorted(heard))
    # only now, when both models have their taps
    if config.optim.compile:
        student.compile()
        if teacher is not None:
            teacher.model.compile()
    return objective, teacher


def untrained_file(name: str, spec: ImageSpec, seed: int = 0) -> ModelFile:
    """Return the file of an untrained model for images; torch's generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = new_model(name, spec)
    return ModelFile(
        name=name,
        class_names=spec.class_names,
        image_size=spec.image_size,
        mean=spec.mean,
        std=spec.std,
        state_dict=model.state_dict(),
        scores={},
        config="",
    )


def student_file(
    config: Config, spec: ImageSpec, state: Mapping[str, Any], scores: Mapping[str, float]
) -> ModelFile:
    """Return what is saved for use: the student alone, of a checkpoint's "student" state."""
    return ModelFile(
        name=config.model.student,
        class_names=spec.class_names,
        image_size=spec.image_size,
        mean=spec.mean,
        std=spec.std,
        state_dict=dict(state),
        scores={name: float(score) for name, score in scores.items() if math.isfinite(score)},
        # what a model file says of an image must not depend on the data set any more
        config=to_yaml(with_settings(config, {"augment": spec.augment})),
    )


class Deployed(nn.Module):
    """A model with its normalisation, of images (B, 3, H, W) in 0..1.

    Args:
        model_file: of the model.
    """

    def __init__(self, model_file: ModelFile):
        super().__init__()
        self.model = build_from_file(model_file)
        self.mean_1C11: Tensor
        self.std_1C11: Tensor
        self.register_buffer("mean_1C11", torch.tensor(model_file.mean).view(1, -1, 1, 1))
        self.register_buffer("std_1C11", torch.tensor(model_file.std).view(1, -1, 1, 1))

    def normalised(self, images_BCHW: Tensor) -> Tensor:
        """Return images as the model was trained on."""
        return (images_BCHW - self.mean_1C11) / self.std_1C11


class DeployedClassifier(Deployed):
    """A classifier with its normalisation: images (B, 3, H, W) in 0..1 to logits (B, K)."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return class scores."""
        return self.model(self.normalised(images_BCHW))


class DeployedDetector(Deployed):
    """A detector with its normalisation: images (B, 3, S, S) in 0..1 to detections (B, D, 6).

    Each of the D rows of an image holds the sides of a box x0, y0, x1, y1 in pixels of the input,
    a score in 0..1 and a label; best first, and -1 throughout where there are fewer.
    """

    def forward(self, images_BCSS: Tensor) -> Tensor:
        """Return the detections, on the CPU."""
        packed_BD6 = torch.full((len(images_BCSS), MOST_DETECTIONS, 6), -1.0)
        for packed_D6, found in zip(packed_BD6, self.model(self.normalised(images_BCSS))):
            columns = [found["scores"][:, None], found["labels"][:, None].float()]
            packed_D6[: len(found["scores"])] = torch.cat([found["boxes"], *columns], dim=1)
        return packed_BD6
