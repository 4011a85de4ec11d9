"""The student with its losses, and the frozen teacher.

Shapes: B batch, C channels, H height, W width, K classes, M boxes of an image,
D entries of an embedding.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from raygkd.engine.gradient_units import GradientUnits
from raygkd.engine.label_loss import LabelLoss
from raygkd.losses import GraphDistillationLoss, TeacherGraph
from raygkd.models import Detector, FeatureTap
from raygkd.models.heads import ProxyTap


@dataclass(frozen=True)
class TeacherOutput:
    """The teacher's outputs for one batch, without gradient.

    Attributes:
        features: level -> feature map (B, C, H, W), or the graph that the losses take; a training
            step removes them as it uses them.
        logits_BK: class scores; None for a detector.
        maps: level -> feature map (B, C, H, W) for a baseline, if ``features`` are graphs.
        embeddings_BD: what a classifier's last layer reads, if a baseline needs it.
        proxies_KD: the vectors of its classes, if a baseline needs them.
    """

    features: dict[int, Tensor] | dict[int, TeacherGraph]
    logits_BK: Tensor | None = None
    maps: Mapping[int, Tensor] | None = None
    embeddings_BD: Tensor | None = None
    proxies_KD: Tensor | None = None


class Teacher:
    """A frozen model. It is not part of the Objective, so DDP, optimiser and checkpoint skip it.

    Args:
        model: a classifier or detector; it is switched to eval mode and its parameters need no
            gradient any more.
        pairs: level of the student -> level of this model whose feature map it is matched with;
            the maps are given under the student's levels.
        proxies: a tap of the model, if embeddings and class proxies are needed.
    """

    def __init__(self, model: nn.Module, pairs: Mapping[int, int], proxies: ProxyTap | None = None):
        self.model = model.eval().requires_grad_(False)
        self.pairs = dict(pairs)
        self._tap = FeatureTap(model, sorted(set(pairs.values())))
        self.proxies = proxies

    def close(self) -> None:
        """Take the hooks off the model."""
        self._tap.remove()
        if self.proxies is not None:
            self.proxies.remove()

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor) -> TeacherOutput:
        """Return features, and a classifier's logits, of normalised images."""
        if isinstance(self.model, Detector):
            # only the pyramid is distilled; the heads are skipped
            return TeacherOutput(self._matched(self.model.features(images_BCHW)))
        logits_BK, features = self._tap(images_BCHW)
        if self.proxies is None:
            return TeacherOutput(self._matched(features), logits_BK)
        return TeacherOutput(
            self._matched(features),
            logits_BK,
            embeddings_BD=self.proxies.take(),
            proxies_KD=self.proxies.class_proxies_KD,
        )

    def _matched(self, features: Mapping[int, Tensor]) -> dict[int, Tensor]:
        return {level: features[other] for level, other in self.pairs.items()}


@dataclass(frozen=True, kw_only=True)
class BaselineTerm:
    """How a baseline's loss enters the total.

    Attributes:
        name: of the term, which is the method's.
        weight: of it.
        task_weight: of the task's loss beside it.
        ramp: share of all steps over which the weight rises from 0; 0 for none.
        reads_logits: it reads class scores, otherwise feature maps.
    """

    name: str
    weight: float
    task_weight: float = 1.0
    ramp: float = 0.0
    reads_logits: bool


class Objective(nn.Module, ABC):
    """Student, adapters and loss terms in one module, so that DDP sees one forward pass.

    Args:
        student: the model that learns.
        levels: its levels that the losses read.
        graph: the graph loss with its adapters, or None.
        baseline: another distillation loss (``raygkd.losses.baseline_loss``), or None.
        baseline_term: how it enters the total.
        proxies: a tap of the student, if the baseline reads embeddings and class proxies.
        task_weight: of the labels' loss; None for 1, or as in ``baseline_term``.
        shares: names of the terms whose weights are shares of the labels' gradient.
        freeze_batch_norm: the student keeps the batch statistics that it has.
        trains_all: every parameter of the student has a gradient; its last layers have none if it
            learns feature maps alone.

    Attributes:
        term_weights: term -> its weight.
        units: what turns shares into factors; None where no weight is one.
        lead: what the weights of the graph losses are multiplied by, from 0 to 1.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        levels: Sequence[int] = (),
        graph: GraphDistillationLoss | None = None,
        baseline: nn.Module | None = None,
        baseline_term: BaselineTerm | None = None,
        proxies: ProxyTap | None = None,
        task_weight: float | None = None,
        shares: Collection[str] = (),
        freeze_batch_norm: bool = False,
        trains_all: bool = True,
    ):
        super().__init__()
        self.student = student
        self.graph, self.baseline, self.baseline_term = graph, baseline, baseline_term
        self.term_weights: dict[str, float] = {"task": 1.0}
        if baseline_term is not None:
            self.term_weights = {
                "task": baseline_term.task_weight,
                baseline_term.name: baseline_term.weight,
            }
        if graph is not None:
            self.term_weights |= graph.term_weights
        if task_weight is not None:
            self.term_weights["task"] = task_weight
        # a term of weight 0 is left out, the task's too
        self.term_weights = {name: w for name, w in self.term_weights.items() if w}
        shares = [name for name in self.term_weights if name in shares]
        self.units = GradientUnits(shares) if shares else None
        self.lead = 1.0
        self.trains_all = trains_all
        self._tap = FeatureTap(student, levels)
        self._proxies = proxies
        self._are_separate = False
        self._freezes_batch_norm = freeze_batch_norm

    def train(self, mode: bool = True) -> Objective:
        """Switch to training, or to evaluation; frozen batch statistics stay as they are."""
        super().train(mode)
        if self._freezes_batch_norm:
            for module in self.student.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    @contextlib.contextmanager
    def separate_terms(self) -> Iterator[None]:
        """Let each of the terms have a gradient of its own, not only ``total``."""
        self._are_separate = True
        try:
            yield
        finally:
            self._are_separate = False

    def close(self) -> None:
        """Take the hooks off the student."""
        self._tap.remove()
        if self._proxies is not None:
            self._proxies.remove()

    @property
    def levels(self) -> tuple[int, ...]:
        """Levels whose maps the losses read."""
        return self._tap.levels

    @property
    def baseline_levels(self) -> tuple[int, ...]:
        """Levels whose maps the baseline reads as the teacher gives them."""
        term = self.baseline_term
        return () if term is None or term.reads_logits else self.levels

    @property
    def reads_logits(self) -> bool:
        """Whether the teacher's logits are needed."""
        return self.baseline_term is not None and self.baseline_term.reads_logits

    @property
    def reads_proxies(self) -> bool:
        """Whether the teacher's embeddings and class proxies are needed."""
        return self._proxies is not None

    @abstractmethod
    def forward(
        self, images_BCHW: Tensor, targets: Any, teacher: TeacherOutput | None
    ) -> tuple[dict[str, Tensor], Any]:
        """Return the unweighted loss terms of a batch (scalars), and the input of the task's meter.

        Args:
            images_BCHW: normalised images.
            targets: the result of ``Task.targets``.
            teacher: the teacher's outputs for the same images, if the method needs them.
        """

    def _distillation(
        self,
        features: Mapping[int, Tensor],
        teacher: TeacherOutput | None,
        boxes: Sequence[Tensor] | None = None,
        **logits_and_targets: Tensor,
    ) -> dict[str, Tensor]:
        """Return the terms that need a teacher, none without one.

        Args:
            features: level -> the student's maps.
            teacher: the teacher's outputs.
            boxes: boxes of each image (M, 4), for a detector.
            logits_and_targets: "student_logits" and "targets" of a classifier.
        """
        terms: dict[str, Tensor] = {}
        nodes = {}
        if self._proxies is not None:
            nodes = {
                "student_embeddings": self._proxies.take(),
                "student_proxies": self._proxies.class_proxies_KD,
            }
        if teacher is None:
            return terms
        if self.baseline is not None and self.baseline_term is not None:
            terms[self.baseline_term.name] = self.baseline(
                student_features=features,
                teacher_features=teacher.maps or teacher.features,
                teacher_logits=teacher.logits_BK,
                teacher_embeddings=teacher.embeddings_BD,
                teacher_proxies=teacher.proxies_KD,
                boxes=boxes,
                **nodes,
                **logits_and_targets,
            )
        if self.graph is not None and self._are_separate:
            terms |= self.graph(features, teacher.features, boxes)
        elif self.graph is not None:
            # a multiple of these weights is enough, and the lead may be 0
            factors = self._factors_at_full_lead()
            weights = [factors[name] for name in self.graph.term_weights]
            terms |= self.graph.terms_with_gradient(features, teacher.features, boxes, weights)
        return terms

    @property
    def factors(self) -> dict[str, float]:
        """Return what each term is multiplied by in the total, apart from a rising weight."""
        fading = () if self.graph is None else self.graph.term_weights
        return {
            name: factor * (self.lead if name in fading else 1.0)
            for name, factor in self._factors_at_full_lead().items()
        }

    def _factors_at_full_lead(self) -> dict[str, float]:
        """Return ``factors`` for a lead of 1."""
        if self.units is None:
            return dict(self.term_weights)
        return {name: self.units.factor(name, w) for name, w in self.term_weights.items()}

    def total(self, terms: Mapping[str, Tensor], progress: float = 1.0) -> Tensor:
        """Return the weighted sum of the terms: L_task + alpha L_V + beta L_E + gamma L_S.

        Args:
            terms: unweighted scalars.
            progress: share of the run's steps that are done, for a term whose weight rises.
        """
        factors, term = self.factors, self.baseline_term
        if term is not None and term.ramp:
            factors[term.name] *= min(1.0, progress / term.ramp)
        return torch.stack([factors[name] * value for name, value in terms.items()]).sum()


class ClassifierObjective(Objective):
    """Cross-entropy and the distillation losses of a classifier.

    Args:
        student: the model that learns.
        label_loss: the loss on the labels; None for plain cross-entropy.
        parts: of every ``Objective``.
    """

    def __init__(self, student: nn.Module, *, label_loss: LabelLoss | None = None, **parts: Any):
        super().__init__(student, **parts)
        self.label_loss = label_loss or LabelLoss()

    def forward(
        self, images_BCHW: Tensor, targets: Tensor, teacher: TeacherOutput | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the unweighted loss terms of a batch (scalars) and the student's logits (B, K)."""
        logits_BK, features = self._tap(images_BCHW)
        terms: dict[str, Tensor] = {}
        if "task" in self.term_weights:
            terms["task"] = self.label_loss(logits_BK, targets)
        terms |= self._distillation(features, teacher, student_logits=logits_BK, targets=targets)
        return terms, logits_BK.detach()


class DetectorObjective(Objective):
    """A detector's own losses, summed, and the distillation losses of its pyramid."""

    def forward(
        self,
        images_BCHW: Tensor,
        targets: Sequence[Mapping[str, Tensor]],
        teacher: TeacherOutput | None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the unweighted loss terms of a batch, and the parts of the task's (scalars)."""
        parts, features = self._tap(images_BCHW, targets)
        terms = {"task": torch.stack([part.float() for part in parts.values()]).sum()}
        boxes = [target["boxes"] for target in targets]
        terms |= self._distillation(features, teacher, boxes)
        return terms, {name: part.detach() for name, part in parts.items()}
