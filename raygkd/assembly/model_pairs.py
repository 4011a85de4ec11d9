"""Teacher and student of a person's own training loop, with the levels that are matched.

Shapes: B batch, C channels, H height, W width, N tokens.
"""

from __future__ import annotations

import contextlib
import gc
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from raygkd.engine import Teacher, TeacherOutput
from raygkd.errors import ConfigError, UserError, brief, reason_of
from raygkd.models import FeatureTap, NamedLevels, feature_shapes, pair_levels, stage_modules

Levels = Sequence[str] | Mapping[str, str] | None
Shapes = dict[int, tuple[int, int, int]]
RECIPE = (
    "put both into one module, wrap that, and call it: class Pair(nn.Module) with self.student = "
    "student, self.matching = matching and forward(self, images): return self.matching(images)"
)


@dataclass(frozen=True, kw_only=True)
class ModelPair:
    """Two models and their levels, which have the same numbers in both."""

    teacher: NamedLevels
    student: NamedLevels

    @classmethod
    def of(
        cls, teacher: nn.Module, student: nn.Module, levels: Levels, images: Tensor
    ) -> ModelPair:
        """Return two models with levels as their owner names them, or with those that suit.

        Raises:
            ConfigError: there are none, a model has no such module, or the models cannot be
                trained as a pair.
        """
        check_images(images)
        _check_models(teacher, student)
        if levels is None:
            size = (images.shape[-2], images.shape[-1])
            of_student, of_teacher = (stage_modules(model, size) for model in (student, teacher))
            paired = pair_levels(
                feature_shapes(student, list(of_student), size),
                feature_shapes(teacher, list(of_teacher), size),
            )
            levels = {of_student[own]: of_teacher[other] for own, other in paired.items()}
        names = list(levels) if isinstance(levels, Iterable) and not isinstance(levels, str) else []
        others = list(levels.values()) if isinstance(levels, Mapping) else names
        if not names or not all(isinstance(name, str) for name in (*names, *others)):
            raise ConfigError(
                f"levels: {brief(levels)} must be paths of modules, such as ['layer1', 'layer2']"
            )
        return cls(
            student=NamedLevels(student, names, "student"),
            teacher=NamedLevels(teacher, others, "teacher"),
        )

    def outputs(self, images: Tensor) -> tuple[dict[int, Any], dict[int, Any]]:
        """Return level -> output of its module, of the student and of the teacher."""
        return _outputs(self.student, images, "student"), _outputs(self.teacher, images, "teacher")

    def shapes(self, images: Tensor) -> tuple[Shapes, Shapes, dict[int, float]]:
        """Return level -> (C, H, W) of the student and of the teacher, and the teacher's scales.

        Raises:
            ConfigError: a model fails, or the output of a module is not a feature map, or not
                finite.
        """
        height, width = images.shape[-2:]
        of_student, of_teacher = self.outputs(images)
        of_both = (
            self.student.learn_layouts(of_student, (height, width)),
            self.teacher.learn_layouts(of_teacher, (height, width)),
        )
        _check_finite(self.student, of_student, "student")
        _check_finite(self.teacher, of_teacher, "teacher")
        return (*of_both, {level: scale_of(output) for level, output in of_teacher.items()})


class ScaledTeacher(Teacher):
    """The frozen teacher, in eval mode in every call, with feature maps of about unit size.

    A batch-normalised adapter starts with maps of unit variance. The vertex loss is relative to the
    teacher's maps, so at maps of another size no learning rate would suit both.

    Args:
        model: the teacher, whose levels have the student's numbers.
        scales: level -> factor of its maps, a power of two.
    """

    def __init__(self, model: nn.Module, scales: Mapping[int, float]):
        super().__init__(model, {level: level for level in scales})
        self._scales = dict(scales)

    def __call__(self, images_BCHW: Tensor) -> TeacherOutput:
        """Return features, whatever mode the teacher has been put into since the last call."""
        if any(module.training for module in self.model.modules()):
            self.model.eval()
        return super().__call__(images_BCHW)

    def _matched(self, features: Mapping[int, Tensor]) -> dict[int, Tensor]:
        maps = super()._matched(features)
        return {
            level: maps_BCHW if self._scales[level] == 1.0 else maps_BCHW * self._scales[level]
            for level, maps_BCHW in maps.items()
        }


def scale_of(maps: Tensor) -> float:
    """Return the power of two that brings the mean square of a teacher's maps closest to 1.

    Multiplication by it is exact in any floating-point type.
    """
    square = float(maps.detach().double().square().mean())
    if not 0.0 < square < math.inf:
        return 1.0
    # half-precision maps stay in its range
    return 2.0 ** max(-14, min(14, round(-math.log2(square) / 2)))


def check_images(images: Any) -> None:
    """Raise ConfigError unless the images are a batch (B, C, H, W)."""
    if isinstance(images, Tensor) and images.ndim == 4 and images.numel():
        return
    given = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
    raise ConfigError(f"images: must be a batch (B, C, H, W) with at least one image; got {given}")


def _check_models(teacher: nn.Module, student: nn.Module) -> None:
    """Raise ConfigError if the models cannot be trained as a pair."""
    for role, model in (("teacher", teacher), ("student", student)):
        if not isinstance(model, nn.Module):
            raise ConfigError(f"{role}: {brief(model)} must be a torch.nn.Module")
        if isinstance(model, DistributedDataParallel):
            raise ConfigError(f"the {role} is wrapped in DistributedDataParallel; {RECIPE}")
        if isinstance(model, torch.jit.ScriptModule):
            raise ConfigError(
                f"the {role} is a TorchScript module, whose feature maps cannot be read; pass the "
                "model that it was made from"
            )
        tensors = (*model.parameters(), *model.buffers())
        if any(not is_lazy(one) and one.is_inference() for one in tensors):
            raise ConfigError(
                f"the {role} was created under torch.inference_mode, so it cannot be trained or "
                "frozen; create it outside"
            )
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    shared = [names[id(one)] for one in teacher.parameters() if id(one) in names]
    if shared:
        raise ConfigError(
            f"teacher and student share {len(shared)} parameters ({shared[0]}), which would be "
            "frozen in both; pass copy.deepcopy(teacher)"
        )


def check_gradients(features: Mapping[int, Tensor], student: NamedLevels) -> None:
    """Raise ConfigError if a level's loss would not train the student.

    Args:
        features: level -> the student's maps.
        student: whose maps they are.
    """
    if not torch.is_grad_enabled():
        return
    for level, maps_BCHW in features.items():
        if not maps_BCHW.requires_grad:
            path = student.path(level)
            raise ConfigError(
                f"levels: no gradient reaches the student through {path!r}: its layers are frozen, "
                "or run in re-entrant checkpointing; omit this level, or pass use_reentrant=False "
                "to torch.utils.checkpoint"
            )


def check_parallel(matching: nn.Module, student: nn.Module) -> None:
    """Raise ConfigError if DistributedDataParallel shares some of the gradients and not all.

    Without any DistributedDataParallel the gradients are shared in another way, or not at all.

    Args:
        matching: whose parameters are the adapters.
        student: the model that learns.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    ours = {id(one) for one in (*matching.parameters(), *student.parameters()) if one.requires_grad}
    for wrapper in gc.get_objects():
        if isinstance(wrapper, DistributedDataParallel):
            held = ours & {id(one) for one in wrapper.parameters()}
            if held and (held != ours or not _is_running(wrapper)):
                raise ConfigError(
                    "DistributedDataParallel does not share all gradients of student and adapters "
                    f"in this call; {RECIPE}"
                )


def _is_running(module: nn.Module) -> bool:
    """Return whether this is called by a module's forward pass."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_locals.get("self") is module:
            return True
    return False


def _check_finite(model: NamedLevels, outputs: Mapping[int, Tensor], role: str) -> None:
    """Raise ConfigError if a map has NaN or infinite values, which no loss could survive."""
    for level, output in outputs.items():
        if not bool(torch.isfinite(output).all()):
            raise ConfigError(
                f"levels: module {model.path(level)!r} of the {role} gives NaN or infinite values "
                "for these images; check the images and the weights"
            )


@contextlib.contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Give a model back what freezing it has changed."""
    training = [module for module in model.modules() if module.training]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in learning:
            parameter.requires_grad_(True)


@torch.no_grad()
def _outputs(model: NamedLevels, images: Tensor, role: str) -> dict[int, Any]:
    """Return level -> its module's output; the model's batch statistics stay as they are."""
    with as_it_was(model), FeatureTap(model, list(model.levels)) as tap:
        try:
            model.eval()
            return tap(images)[1]
        except UserError:
            raise
        except Exception as error:  # of any type: a forward pass may be anyone's code
            name = type(model.model).__name__
            raise ConfigError(
                f"the {role} {name} fails on images of shape {tuple(images.shape)}: "
                f"{reason_of(error)}"
            ) from error
