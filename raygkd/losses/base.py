"""Common interface of the baselines: one set of keyword arguments, of which each uses some.

Shape letters: B batch, C channels, H height, W width, K classes, M boxes of an image, D entries of
an embedding.
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
    chosen_levels,
    levels_problem,
    maps_problem,
    missing_levels_problem,
    on_one_grid,
    without_gradient,
)
from raygkd.registry import own_settings


@dataclass(frozen=True)
class Setup:
    """What a baseline is built for, apart from its settings.

    Attributes:
        name: name of the baseline.
        weight: published weight of its term in the total.
        levels: levels that it reads, or "all", "middle" or "last" of the available levels.
        student_shapes: level -> (C, H, W) of the student's feature maps; None if unknown.
        teacher_shapes: the same for the teacher, with the same levels.
        canvas: side in pixels of both detectors' square input; None if unknown.
        embedding_sizes: D of the student's and of the teacher's embeddings; None if unknown.
    """

    name: str
    weight: float
    levels: str | Sequence[int]
    student_shapes: Mapping[int, Shape] | None = None
    teacher_shapes: Mapping[int, Shape] | None = None
    canvas: int | None = None
    embedding_sizes: tuple[int, int] | None = None


class Method:
    """A value of ``--method``: what a student learns from besides the labels.

    Attributes:
        task: "classification" or "detection"; None for both.
        matches_graphs: whether graphs of channels are matched.
        baseline: name of a baseline whose loss is added, for methods that are not baselines.
        baseline_share: weight of that loss as a share of the labels' gradient; None for its
            published weight.
    """

    task: ClassVar[str | None] = None
    matches_graphs: ClassVar[bool] = False
    baseline: ClassVar[str | None] = None
    baseline_share: ClassVar[float | None] = None


class BaselineLoss(nn.Module, Method, ABC):
    """A published distillation loss, without its weight.

    ``@METHODS.register(name)`` registers a subclass. Its settings are the fields of a nested
    dataclass ``Settings``, each declared by ``option``; they are keyword arguments of its
    ``__init__``. The total is ``task_weight * task loss + weight * loss``.

    Args:
        setup: what it is built for.

    Attributes:
        name: name of the baseline, for error messages.
        weight: published weight of its term in the total; for detectors, of one-stage detectors.
        source: authors and publication; unless stated otherwise, the weight is RepDistiller's for
            CIFAR-100.
        needs: required keyword arguments of ``forward``.
        reads: "logits" or "features".
        levels: which of the available levels it reads: "all", "middle" or "last"; None for logits.
        task_weight: published weight of the task's loss in the total.
        ramp: share of the training over which the weight rises linearly from 0.
        two_views: in training, each batch is followed by a second view of its images.
        two_stage_weight: published weight for two-stage detectors, if different.
        two_stage_settings: setting -> published value for two-stage detectors, if different.
    """

    task: ClassVar[str | None] = "classification"
    weight: float = 1.0
    source: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]]
    reads: ClassVar[str] = "logits"
    levels: ClassVar[str | None] = None
    task_weight: ClassVar[float] = 1.0
    ramp: ClassVar[float] = 0.0
    two_views: ClassVar[bool] = False
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
    def reads_proxies(cls) -> bool:
        """Return whether it reads embeddings and class proxies."""
        return "student_proxies" in cls.needs

    @classmethod
    def levels_of(cls, levels: Iterable[int]) -> tuple[int, ...]:
        """Return the levels that it reads by default, at least one; none for logits."""
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
        student_embeddings: Tensor | None = None,
        teacher_embeddings: Tensor | None = None,
        student_proxies: Tensor | None = None,
        teacher_proxies: Tensor | None = None,
    ) -> Tensor:
        """Return the loss without its published weight; the teacher gets no gradient.

        Args:
            student_logits: class scores (B, K).
            teacher_logits: class scores (B, K).
            student_features: level -> feature maps (B, C_s, H_s, W_s).
            teacher_features: level -> feature maps (B, C_t, H_t, W_t).
            targets: class of each image (B,), int64; of mixed images the shares of the classes
                (B, K).
            boxes: (M, 4) for each image, as x0, y0, x1, y1 in pixels of the canvas; M may be 0.
            student_embeddings: what the last layer reads (B, D_s).
            teacher_embeddings: what the last layer reads (B, D_t).
            student_proxies: vectors of the classes in the space of the embeddings (K, D_s).
            teacher_proxies: the same of the teacher (K, D_t).

        Returns:
            A scalar, float32 (float64 for float64 inputs), under autocast too.

        Raises:
            ConfigError: an argument in ``needs`` is missing, or the shapes do not match.
        """
        arguments = {
            "student_logits": student_logits,
            "teacher_logits": teacher_logits,
            "student_features": student_features,
            "teacher_features": teacher_features,
            "targets": targets,
            "boxes": boxes,
            "student_embeddings": student_embeddings,
            "teacher_embeddings": teacher_embeddings,
            "student_proxies": student_proxies,
            "teacher_proxies": teacher_proxies,
        }
        missing = [name for name in self.needs if arguments[name] is None]
        if missing:
            raise ConfigError(f"{self.name} needs {' and '.join(missing)}")
        return self.loss(**{name: arguments[name] for name in self.needs})

    @abstractmethod
    def loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss, given the arguments in ``needs``."""


class MapLoss(BaselineLoss):
    """A loss of feature maps.

    Args:
        setup: what it is built for. Its shapes define the available levels; without shapes, they
            are the levels that student and teacher share in a call.

    Raises:
        ConfigError: the shapes have different levels, or lack a requested level.
    """

    needs: ClassVar[tuple[str, ...]] = ("student_features", "teacher_features")
    reads: ClassVar[str] = "features"
    levels: ClassVar[str | None] = "all"

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.student_shapes = dict(setup.student_shapes or {})
        self.teacher_shapes = dict(setup.teacher_shapes or {})
        if not setup.levels:
            raise ConfigError(f"{self.name}: no levels; choose at least one")
        self._requested_levels = setup.levels
        if setup.student_shapes is not None or setup.teacher_shapes is not None:
            require(levels_problem(self.student_shapes, self.teacher_shapes))
            self._requested_levels = self._levels(self.student_shapes)

    def checked_levels(
        self, student_features: Mapping[int, Tensor], teacher_features: Mapping[int, Tensor]
    ) -> tuple[int, ...]:
        """Return the levels to read of a batch.

        Raises:
            ConfigError: a level is missing, or its maps are not (B, C, H, W) of one batch.
        """
        shared = [level for level in student_features if level in teacher_features]
        levels = self._levels(shared)
        for level in levels:
            self._require(maps_problem(level, student_features[level], teacher_features[level]))
        return levels

    def require_shapes(self, reason: str) -> None:
        """Raise ConfigError with the reason if the setup has no shapes."""
        if not self.student_shapes:
            raise ConfigError(f"{self.name} needs student_shapes and teacher_shapes: {reason}")

    def require_pairs(self, features_BCHW: Tensor) -> None:
        """Raise ConfigError if a batch has fewer than two images to compare."""
        if len(features_BCHW) < 2:
            raise ConfigError(
                f"{self.name} compares the images of a batch: it needs at least 2; got 1"
            )

    def _require(self, problem: str | None) -> None:
        """Raise ConfigError with the baseline's name and the problem, if there is one."""
        require(problem and f"{self.name}: {problem}")

    def _levels(self, available: Sequence[int] | Mapping[int, Shape]) -> tuple[int, ...]:
        """Return which of the available levels to read."""
        if isinstance(self._requested_levels, str):
            if not available:
                raise ConfigError(f"{self.name}: student and teacher share no level")
            return chosen_levels(self._requested_levels, available)
        self._require(missing_levels_problem(self._requested_levels, available))
        return tuple(self._requested_levels)


class FeatureLoss(MapLoss):
    """A loss of feature maps, summed over levels, as most baselines were published."""

    def loss(
        self,
        student_features: Mapping[int, Tensor],
        teacher_features: Mapping[int, Tensor],
        **others: Any,
    ) -> Tensor:
        """Return the sum over the levels; see ``checked_levels`` for errors."""
        levels = self.checked_levels(student_features, teacher_features)
        terms = [
            self._full_level_loss(level, student_features[level], teacher_features[level], **others)
            for level in levels
        ]
        return torch.stack(terms).sum()

    @abstractmethod
    def level_loss(
        self, level: int, student_BCHW: Tensor, teacher_BCHW: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the loss of one level (scalar), in full precision; the teacher is detached."""

    @full_precision
    def _full_level_loss(
        self, level: int, student_BCHW: Tensor, teacher_BCHW: Tensor, **others: Any
    ) -> Tensor:
        return self.level_loss(level, student_BCHW, without_gradient(teacher_BCHW), **others)


class AlignedLoss(FeatureLoss):
    """A loss of maps of the same shape, with an adapter per level for the student's channels.

    Without shapes there are no adapters, and the numbers of channels must be equal.
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
        """Return both maps on the coarser grid, the student's adapted to the teacher's channels."""
        student_BCHW, teacher_BCHW = on_one_grid(student_BCHW, teacher_BCHW)
        if self.adapters:
            return self.adapters[str(level)](student_BCHW), teacher_BCHW
        if student_BCHW.shape[1] != teacher_BCHW.shape[1]:
            raise ConfigError(
                f"{self.name}: level {level} has {student_BCHW.shape[1]} channels in the student "
                f"and {teacher_BCHW.shape[1]} in the teacher; pass student_shapes and "
                "teacher_shapes to add an adapter"
            )
        return student_BCHW, teacher_BCHW
