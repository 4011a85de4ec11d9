"""How every baseline is called: one set of keywords, of which each takes what it needs.

Shape letters: B batch, C channels, H height, W width, K classes, M boxes of an image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from raygkd.errors import ConfigError
from raygkd.graph import full_precision, require
from raygkd.losses.levels import (
    Shape,
    absent_problem,
    chosen_levels,
    levels_problem,
    maps_problem,
    on_one_grid,
    without_gradient,
)
from raygkd.registry import own_settings


@dataclass(frozen=True)
class Setup:
    """What a baseline is built for, whatever its settings.

    Attributes:
        name: of the baseline.
        weight: published weight of its term in the total.
        levels: those it reads, or "all", "middle" or "last" of those that there are.
        student_shapes: level -> (C, H, W) of the student's feature maps; None where unknown.
        teacher_shapes: the same of the teacher, for the same levels.
        canvas: side in pixels of the square that both detectors see; None where unknown.
    """

    name: str
    weight: float
    levels: str | Sequence[int]
    student_shapes: Mapping[int, Shape] | None = None
    teacher_shapes: Mapping[int, Shape] | None = None
    canvas: int | None = None


class Method:
    """What ``--method`` takes: what a student learns from besides the labels.

    Attributes:
        task: that it is for, "classification" or "detection"; None for both.
        matches_graphs: whether graphs of channels are matched.
        baseline: name of a baseline whose loss is a part of it, where it is none itself.
        baseline_share: weight of that loss as a share of the labels' gradient; None for the
            published one.
    """

    task: ClassVar[str | None] = None
    matches_graphs: ClassVar[bool] = False
    baseline: ClassVar[str | None] = None
    baseline_share: ClassVar[float | None] = None


class BaselineLoss(nn.Module, Method, ABC):
    """A published distillation loss, without its weight.

    ``@METHODS.register(name)`` enters a subclass. Its settings are the fields of a dataclass
    ``Settings`` in it, each declared by ``option``; they are the keywords of its ``__init__``. The
    total is ``task_weight * task loss + weight * loss``.

    Args:
        setup: what it is built for.

    Attributes:
        name: of the baseline, for errors.
        weight: published weight of its term in the total; of a detector's, for one-stage detectors.
        source: authors, and where it was published; the weight is that of RepDistiller for
            CIFAR-100 where nothing else is said.
        needs: the keywords that ``forward`` cannot do without.
        reads: "logits" or "features".
        levels: those it reads of those that there are: "all", "middle" or "last"; None of logits.
        task_weight: published weight of the task's loss beside it.
        ramp: share of the training over which the weight rises from 0, linearly.
        two_stage_weight: published weight for two-stage detectors, where it is another.
        two_stage_settings: setting -> published value for two-stage detectors, where another.
    """

    task: ClassVar[str | None] = "classification"
    weight: float = 1.0
    source: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]]
    reads: ClassVar[str] = "logits"
    levels: ClassVar[str | None] = None
    task_weight: ClassVar[float] = 1.0
    ramp: ClassVar[float] = 0.0
    two_stage_weight: ClassVar[float | None] = None
    two_stage_settings: ClassVar[Mapping[str, float]] = {}

    def __init__(self, setup: Setup):
        super().__init__()
        self.name, self.weight = setup.name, setup.weight

    @classmethod
    def weight_for(cls, *, two_stage: bool) -> float:
        """Return the published weight of the term for a kind of detector."""
        if two_stage and cls.two_stage_weight is not None:
            return cls.two_stage_weight
        return cls.weight

    @classmethod
    def settings_for(cls, *, two_stage: bool) -> dict[str, Any]:
        """Return the published settings for a kind of detector."""
        settings: Any = own_settings(cls)
        published = {leaf.name: leaf.default for leaf in fields(settings)} if settings else {}
        return {**published, **(cls.two_stage_settings if two_stage else {})}

    @classmethod
    def levels_of(cls, levels: Iterable[int]) -> tuple[int, ...]:
        """Return those of the levels, at least one, that it reads by default; none for logits."""
        return chosen_levels(cls.levels, levels) if cls.levels else ()

    def forward(
        self,
        *,
        student_logits: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        student_features: Mapping[int, Tensor] | None = None,
        teacher_features: Mapping[int, Tensor] | None = None,
        targets: Tensor | None = None,
        boxes: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Return the loss, without its published weight; the teacher gets no gradient.

        Args:
            student_logits: class scores (B, K).
            teacher_logits: class scores (B, K).
            student_features: level -> feature maps (B, C_s, H_s, W_s).
            teacher_features: level -> feature maps (B, C_t, H_t, W_t).
            targets: class of each image (B,), int64.
            boxes: of each image, (M, 4) as x0, y0, x1, y1 in pixels of the canvas; M may be 0.

        Returns:
            A scalar, float32 (float64 for float64 inputs) under autocast too.

        Raises:
            ConfigError: something in ``needs`` is missing, or the shapes do not fit.
        """
        given = {
            "student_logits": student_logits,
            "teacher_logits": teacher_logits,
            "student_features": student_features,
            "teacher_features": teacher_features,
            "targets": targets,
            "boxes": boxes,
        }
        missing = [name for name in self.needs if given[name] is None]
        if missing:
            raise ConfigError(f"{self.name} needs {' and '.join(missing)}")
        return self.loss(**{name: given[name] for name in self.needs})

    @abstractmethod
    def loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of what is in ``needs``."""


class FeatureLoss(BaselineLoss):
    """A loss of feature maps: the sum of what each level gives, as the baselines are published.

    Args:
        setup: what it is built for. Where it has shapes, they say which levels there are;
            otherwise those do that student and teacher share in a call.

    Raises:
        ConfigError: the shapes are not of the same levels, or lack a level that is wanted.
    """

    needs: ClassVar[tuple[str, ...]] = ("student_features", "teacher_features")
    reads: ClassVar[str] = "features"
    levels: ClassVar[str | None] = "all"

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.student_shapes = dict(setup.student_shapes or {})
        self.teacher_shapes = dict(setup.teacher_shapes or {})
        if not setup.levels:
            raise ConfigError(f"{self.name}: no levels: choose at least one")
        self._wanted = setup.levels
        if setup.student_shapes is not None or setup.teacher_shapes is not None:
            require(levels_problem(self.student_shapes, self.teacher_shapes))
            self._wanted = self._levels(self.student_shapes)

    def loss(
        self,
        student_features: Mapping[int, Tensor],
        teacher_features: Mapping[int, Tensor],
        **others: Any,
    ) -> Tensor:
        """Return the sum over the levels.

        Raises:
            ConfigError: a level is missing, or its maps are not (B, C, H, W) of one batch.
        """
        shared = [level for level in student_features if level in teacher_features]
        levels = self._levels(shared)
        for level in levels:
            self._require(maps_problem(level, student_features[level], teacher_features[level]))
        terms = [
            self._of_level(level, student_features[level], teacher_features[level], **others)
            for level in levels
        ]
        return torch.stack(terms).sum()

    @abstractmethod
    def level_loss(
        self, level: int, student_BCHW: Tensor, teacher_BCHW: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the loss of one level (scalar), in full precision; the teacher is detached."""

    def require_shapes(self, why: str) -> None:
        """Raise ConfigError with the reason when the setup has no shapes."""
        if not self.student_shapes:
            raise ConfigError(f"{self.name} needs student_shapes and teacher_shapes: {why}")

    def require_pairs(self, features_BCHW: Tensor) -> None:
        """Raise ConfigError when a batch has no two images to compare."""
        if len(features_BCHW) < 2:
            raise ConfigError(
                f"{self.name} compares the images of a batch: it needs at least 2; got 1"
            )

    def _require(self, problem: str | None) -> None:
        """Raise ConfigError with the name before the problem, where there is one."""
        require(problem and f"{self.name}: {problem}")

    @full_precision
    def _of_level(
        self, level: int, student_BCHW: Tensor, teacher_BCHW: Tensor, **others: Any
    ) -> Tensor:
        return self.level_loss(level, student_BCHW, without_gradient(teacher_BCHW), **others)

    def _levels(self, known: Sequence[int] | Mapping[int, Shape]) -> tuple[int, ...]:
        """Return the levels to read of those that there are."""
        if isinstance(self._wanted, str):
            if not known:
                raise ConfigError(f"{self.name}: student and teacher share no level")
            return chosen_levels(self._wanted, known)
        self._require(absent_problem(self._wanted, known))
        return tuple(self._wanted)


class AlignedLoss(FeatureLoss):
    """A loss of maps of one shape: an adapter per level gives the student the teacher's channels.

    Without shapes there are no adapters, and the channels must be the same.
    """

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.adapters = nn.ModuleDict()
        if self.student_shapes:
            for level in self._levels(self.student_shapes):
                adapter = self.adapter(self.student_shapes[level][0], self.teacher_shapes[level][0])
                self.adapters[str(level)] = adapter

    @abstractmethod
    def adapter(self, student_channels: int, teacher_channels: int) -> nn.Module:
        """Return a module from (B, C_s, H, W) to (B, C_t, H, W)."""

    def aligned(
        self, level: int, student_BCHW: Tensor, teacher_BCHW: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return both maps on the coarser grid, the student's with the teacher's channels."""
        student_BCHW, teacher_BCHW = on_one_grid(student_BCHW, teacher_BCHW)
        if self.adapters:
            return self.adapters[str(level)](student_BCHW), teacher_BCHW
        if student_BCHW.shape[1] != teacher_BCHW.shape[1]:
            raise ConfigError(
                f"{self.name}: level {level} has {student_BCHW.shape[1]} channels in the student"
                f" and {teacher_BCHW.shape[1]} in the teacher: give student_shapes and"
                " teacher_shapes, so that there is an adapter"
            )
        return student_BCHW, teacher_BCHW
