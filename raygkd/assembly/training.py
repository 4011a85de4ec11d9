"""Configuration -> a training run of one rank.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raygkd.assembly.matched_levels import matched_levels
from raygkd.assembly.methods import (
    distils,
    fades,
    share_without_labels,
    trains_last_layer,
    uses_teacher,
)
from raygkd.assembly.models import input_spec
from raygkd.assembly.optimizers import optimizer_and_schedule
from raygkd.assembly.recipes import (
    build_average,
    build_mixing,
    build_patience,
    changes_batches,
    has_two_views,
)
from raygkd.assembly.student_objective import build_objective
from raygkd.config import Config, to_yaml, with_settings
from raygkd.data.spec import ImageSpec
from raygkd.engine import (
    Classification,
    Detection,
    Objective,
    Task,
    Teacher,
    TeacherLookup,
    TeacherStore,
    Training,
)
from raygkd.engine.loop import Stream
from raygkd.engine.without_labels import WithoutLabels
from raygkd.models import ModelFile, build_from_file, model_input
from raygkd.models.fake_quantised import QuantisedGraph
from raygkd.models.heads import ProxyTap


def build_task(
    spec: ImageSpec, stream: Stream, unlabelled_share: float = 0.0
) -> Classification | Detection:
    """Return the task of images with labels or boxes.

    Args:
        spec: the images' classes and task.
        stream: the rank's images.
        unlabelled_share: share of each training batch that has no labels.
    """
    if spec.task == "classification":
        return Classification(
            len(spec.class_names),
            spec.score,
            unlabelled_share,
            functools.partial(stream.eval_batches, "labelled"),
        )
    assert stream.boxes is not None
    return Detection(len(spec.class_names), stream.boxes, spec.score)


def file_normaliser(model_file: ModelFile, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return the ``normaliser`` of a model file's model."""
    interpolation = model_input(model_file.name).interpolation
    return normaliser(model_file.mean, model_file.std, device, model_file.image_size, interpolation)


def normaliser(
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
    size: tuple[int, int],
    interpolation: str = "bilinear",
) -> Callable[[Tensor], Tensor]:
    """Return the function of images (B, C, H, W) in 0..1 to the input of a model.

    They are resized to ``size`` (height and width in pixels), where they have another, and become
    (image - mean) / std.

    Args:
        mean, std: by channel.
        device: of the images.
        size: height and width in pixels.
        interpolation: "bilinear", or "bicubic", which overshoots, so that its result is clipped.
    """
    mean_1C11 = torch.tensor(mean, device=device).view(1, -1, 1, 1)
    std_1C11 = torch.tensor(std, device=device).view(1, -1, 1, 1)

    def inputs(images_BCHW: Tensor) -> Tensor:
        if images_BCHW.shape[2:] != size:
            images_BCHW = F.interpolate(images_BCHW, size, mode=interpolation, antialias=True)
            images_BCHW = images_BCHW.clamp(0.0, 1.0)
        return (images_BCHW - mean_1C11) / std_1C11

    return inputs


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
    graph: QuantisedGraph | None = None,
) -> Training:
    """Return a run of one rank, ready for its first epoch.

    Args:
        config: the settings.
        spec: the images' classes, size and normalisation.
        teacher_file: the teacher; None if the method needs none.
        stream: the rank's images.
        device: where to train.
        rank: rank of this process.
        parallel: wraps the objective for several ranks (DDP).
        begun: when its preparation began, by ``time.perf_counter``; None for now.
        teacher_store: cache of the teacher's outputs; None to run the teacher every time, as it is
            for images that are mixed or have a second view, which have no row.
        graph: of a student that is trained in 8 bits, which normalises its images; None in float.
    """
    begun = time.perf_counter() if begun is None else begun
    optim = config.optim
    if changes_batches(config):
        teacher_store = None
    objective, teacher_model = _build_models(
        config, spec, teacher_file, device, teacher_store, graph
    )
    averaged = build_average(config.recipe, objective.student)
    # only now, when both models have their taps, and the student's average is made
    if optim.compile:
        objective.student.compile()
        if teacher_model is not None:
            teacher_model.model.compile()
    optimizer, schedule = optimizer_and_schedule(
        optim, objective, objective.student, math.ceil(stream.steps_per_epoch / optim.accumulate)
    )
    amp = amp_dtype(optim.amp, device)
    own_input = input_spec(config.model.student, spec)
    own_filter = model_input(config.model.student).interpolation
    statistics = (own_input.mean, own_input.std) if graph is None else ((0.0,) * 3, (1.0,) * 3)
    normalise = normaliser(*statistics, device, spec.image_size, own_filter)
    lookup = None
    if teacher_model is not None and teacher_store is not None:
        lookup = TeacherLookup(teacher_model, teacher_store, objective)
    share = share_without_labels(config, spec)
    teacher_scores = {}
    if teacher_file is not None and fades(config) and share < 1:
        teacher_scores = teacher_file.scores
    teacher_input: ImageSpec | ModelFile = spec
    teacher_filter = own_filter
    if teacher_file is not None:
        teacher_input, teacher_filter = teacher_file, model_input(teacher_file.name).interpolation
    teacher_normalise = normaliser(
        teacher_input.mean,
        teacher_input.std,
        device,
        spec.of_teacher().image_size,
        teacher_filter,
    )
    task: Task = build_task(spec, stream, share)
    if not spec.has_labels:
        assert teacher_model is not None
        compares_classes = trains_last_layer(config, spec)
        task = WithoutLabels(teacher_model.model, teacher_normalise, spec.score, compares_classes)
    return Training(
        task=task,
        objective=objective,
        parallel=parallel(objective),
        teacher=teacher_model,
        stream=stream,
        optimizer=optimizer,
        schedule=schedule,
        scaler=torch.amp.GradScaler(device.type, enabled=amp == torch.float16),
        normalise=normalise,
        teacher_normalise=teacher_normalise,
        device=device,
        epochs=optim.epochs,
        seed=optim.seed,
        lookup=lookup,
        rank=rank,
        clip_norm=optim.clip_norm,
        amp=amp,
        accumulate=optim.accumulate,
        two_views=has_two_views(config.method.method),
        mixing=build_mixing(config.recipe, len(spec.class_names)),
        averaged=averaged,
        patience=build_patience(config, spec),
        teacher_score=teacher_scores.get(f"val_{task.lead_score}"),
        config=to_yaml(config),
        begun=begun,
    )


def _build_models(
    config: Config,
    spec: ImageSpec,
    teacher_file: ModelFile | None,
    device: torch.device,
    store: TeacherStore | None,
    graph: QuantisedGraph | None,
) -> tuple[Objective, Teacher | None]:
    teacher_model = None
    if uses_teacher(config):
        if teacher_file is None:
            raise ValueError("this run needs a teacher")
        teacher_model = build_from_file(teacher_file)
    objective = build_objective(config, spec, teacher_model, graph)
    student = objective.student
    objective.to(device)
    teacher = None
    if teacher_model is not None and distils(config):
        pairs: dict[int, int] = {}
        if objective.levels:
            pairs |= matched_levels(config, teacher_model, student, spec).pairs
        if store is not None and pairs:
            # what other trials may want is kept with what this one does
            others = with_settings(config, {"levels": store.levels, "method": "graph"})
            pairs = dict(matched_levels(others, teacher_model, student, spec).pairs) | pairs
        proxies = None
        if objective.reads_proxies:
            proxies = ProxyTap(teacher_model, len(spec.class_names))
        teacher = Teacher(teacher_model.to(device), pairs, proxies)
    return objective, teacher
