"""A training step of logit distillation beside the same step of timm and of torchdistill.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raygkd.bench.rows import Row, Rows
from raygkd.bench.runs import SameBatch, classes_spec, make_training, random_batch
from raygkd.data.spec import ImageSpec
from raygkd.engine import Training, training_step
from raygkd.engine.measure import interleaved
from raygkd.optional_packages import require

CLASSES = 100
TEMPERATURE, LR, MOMENTUM, WEIGHT_DECAY = 4.0, 0.05, 0.9, 5e-4
SETTINGS = {
    "method": "kd",
    "lr": LR,
    "momentum": MOMENTUM,
    "weight_decay": WEIGHT_DECAY,
    "student_weights": "none",
}
# peer, its pair of models, side of the images in pixels, batch when quick and otherwise
PAIRS = (
    ("timm", "timm:vit_small_patch16_224", "timm:mobilenetv4_conv_small", 224, (4, 16)),
    ("torchdistill", "resnet32x4", "resnet8x4", 32, (32, 64)),
)
BOUND = 1.02
Step = Callable[[], Any]


def peer_step_rows(device: torch.device, *, quick: bool) -> Rows:
    """Yield seconds of a step with ``kd`` beside timm's and torchdistill's of the same models."""
    require("torchdistill", of="raygkd bench peers", extra="peers")
    for peer, teacher, student, side, sizes in PAIRS:
        size = sizes[0 if quick else 1]
        spec = classes_spec(CLASSES, side)
        stream = SameBatch(random_batch(size, spec))
        settings = {**SETTINGS, "teacher": teacher, "student": student, "batch_size": size}
        training = make_training(settings, spec, stream, device)
        steps: dict[str, Step] = {
            "raygkd": functools.partial(training_step, training, stream.batch),
            peer: STEPS[peer](training, spec, stream.batch),
        }
        timings = interleaved(steps, 5 if quick else 9)
        yield Row(
            what=f"step of {teacher} -> {student}, batch {size}, {side} pixels, kd",
            against=f"in {peer}",
            value=timings.ratio("raygkd", peer),
            unit="x",
            bound=BOUND,
            configuration={"seconds": timings.medians},
        )


def _timm_step(training: Training, spec: ImageSpec, batch: Mapping[str, Tensor]) -> Step:
    from timm.optim import create_optimizer_v2
    from timm.task import LogitDistillationTask

    teacher, student = (copy.deepcopy(model.net) for model in _models(training))
    task = LogitDistillationTask(
        student_model=student,
        teacher_model=teacher,
        criterion=nn.CrossEntropyLoss(),
        distill_loss_weight=1.0,
        temperature=TEMPERATURE,
        device=training.device,
        verbose=False,
    ).train()
    optimizer = create_optimizer_v2(
        student, opt="sgd", lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )

    def step() -> None:
        images_BCHW, labels_B = _prepared(batch, spec, training.device)
        optimizer.zero_grad()
        task(images_BCHW, labels_B)["loss"].backward()
        optimizer.step()

    return step


def _torchdistill_step(training: Training, spec: ImageSpec, batch: Mapping[str, Tensor]) -> Step:
    from torchdistill.core.distillation import get_distillation_box
    from torchdistill.core.interfaces import forward_proc  # noqa: F401  (registers its functions)

    teacher, student = (copy.deepcopy(model) for model in _models(training))
    logits = {"module_path": ".", "module_io": "output"}
    places = {f"{of}_{key}": one for of in ("student", "teacher") for key, one in logits.items()}
    term = {"key": "KDLoss", "kwargs": {**places, "temperature": TEMPERATURE, "alpha": 0.5}}
    box = get_distillation_box(
        teacher,
        student,
        {},
        {
            "num_epochs": 1,
            "teacher": {"requires_grad": False, "forward_proc": "forward_batch_only"},
            "student": {"forward_proc": "forward_batch_only"},
            "criterion": {
                "key": "WeightedSumLoss",
                "kwargs": {"sub_terms": {"kd": {"criterion": term, "weight": 2.0}}},
            },
            "optimizer": {
                "key": "SGD",
                "kwargs": {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY},
            },
        },
        device=training.device,
        device_ids=None,
        distributed=False,
        lr_factor=1,
    )
    teacher.eval()
    student.train()

    def step() -> None:
        images_BCHW, labels_B = _prepared(batch, spec, training.device)
        box.post_forward_process(box.forward_process(images_BCHW, labels_B))

    return step


STEPS: Mapping[str, Callable[[Training, ImageSpec, Mapping[str, Tensor]], Step]] = {
    "timm": _timm_step,
    "torchdistill": _torchdistill_step,
}


def _models(training: Training) -> tuple[Any, Any]:
    assert training.teacher is not None
    return training.teacher.model, training.objective.student


def _prepared(
    batch: Mapping[str, Tensor], spec: ImageSpec, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return normalised images (B, C, H, W) and labels (B,) on the device."""
    images_BCHW = batch["image"].to(device).float().div_(255)
    mean_C11, std_C11 = (
        torch.tensor(values, device=device).view(-1, 1, 1) for values in (spec.mean, spec.std)
    )
    return (images_BCHW - mean_C11) / std_C11, batch["label"].to(device)
