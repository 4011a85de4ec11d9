"""The losses that are wrapped from the torchdistill package: AT, RKD, PKT, VID and DIST.

torchdistill is imported when one of them is built. Its losses take nested mappings: a module's
name in the model -> "output" -> tensor. Its similarity-preserving loss is not wrapped: it divides
the rows by their sums of absolute values, where the paper takes Euclidean norms.

Shape letters: B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from raygkd.errors import ConfigError
from raygkd.graph import (
    full_precision,
    require,
    shape_problem,
    temperature_problem,
    weight_problems,
)
from raygkd.losses.base import BaselineLoss, FeatureLoss, Setup
from raygkd.losses.levels import on_one_grid

# where in a model's outputs torchdistill is told to find what it compares
PLACE = "compared"
PLACED = {"io": "output", "path": PLACE}
PAIRS = {PLACE: {"student": PLACED, "teacher": PLACED}}
# stands for an embedding of zeros, whose length has no gradient in PKT
ALMOST_ZERO = 1e-12


class AT(FeatureLoss):
    """Attention transfer: where on the map the squared activations are.

    Source: Zagoruyko and Komodakis, arXiv 1612.03928, with the mean over positions of its code.
    """

    def __init__(self, setup: Setup):
        super().__init__(setup)
        with _installed(self.name):
            from torchdistill.losses.mid_level import ATLoss
        self.criterion = ATLoss(PAIRS, mode="code")

    def level_loss(self, level: int, student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
        """Return the mean squared difference of both attention maps, each of unit length."""
        student_BCHW, teacher_BCHW = on_one_grid(student_BCHW, teacher_BCHW)
        return self.criterion(_placed(student_BCHW), _placed(teacher_BCHW))


class RKD(FeatureLoss):
    """Distances and angles between the images' embeddings: maps averaged over their positions.

    Two images have one distance, which always agrees, and no angle: it says something from three
    images in a batch on.

    Args:
        setup: what it is built for.
        distance: weight of the distances.
        angle: weight of the angles.

    Raises:
        ConfigError: a weight is negative, or both are 0.

    Source: Park et al., arXiv 1904.05068.
    """

    def __init__(self, setup: Setup, *, distance: float, angle: float):
        super().__init__(setup)
        require(*weight_problems(distance=distance, angle=angle))
        with _installed(self.name):
            from torchdistill.losses.mid_level import RKDLoss
        self.criterion = RKDLoss(PLACE, PLACE, distance, angle, reduction="mean")

    def level_loss(self, level: int, student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
        """Return the weighted sum of both smooth L1 losses."""
        self.require_pairs(student_BCHW)
        return self.criterion(_placed(_embedded(student_BCHW)), _placed(_embedded(teacher_BCHW)))


class PKT(FeatureLoss):
    """Cosines of the images' embeddings, as probabilities; see ``RKD`` for the embedding.

    An embedding of zeros, which has no cosine, counts as one without gradient.

    Source: Passalis and Tefas, arXiv 1803.10837.
    """

    def __init__(self, setup: Setup):
        super().__init__(setup)
        with _installed(self.name):
            from torchdistill.losses.mid_level import PKTLoss
        self.criterion = PKTLoss(PLACE, "output", PLACE, "output")

    def level_loss(self, level: int, student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
        """Return the divergence of the probabilities (B, B), averaged over their entries."""
        self.require_pairs(student_BCHW)
        student_BC, teacher_BC = _embedded(student_BCHW), _embedded(teacher_BCHW)
        zero_B1 = (student_BC == 0).all(1, keepdim=True)
        student_BC = student_BC.masked_fill(zero_B1, ALMOST_ZERO)
        return self.criterion(_placed(student_BC), _placed(teacher_BC))


class VID(FeatureLoss):
    """Variational information: a regressor's mean and a variance per channel of the teacher.

    Args:
        setup: what it is built for; it needs the shapes.
        variance: with which every channel starts.
        floor: added to the variance, so that it stays above 0.

    Raises:
        ConfigError: the shapes are missing, or the variance is not above the floor.

    Source: Ahn et al., arXiv 1904.05835.
    """

    def __init__(self, setup: Setup, *, variance: float, floor: float):
        super().__init__(setup)
        self.require_shapes("each level has a regressor of its own")
        if not 0 < floor < variance:
            raise ConfigError(
                f"{self.name}: variance must be above floor, and floor above 0;"
                f" got {variance} and {floor}"
            )
        with _installed(self.name):
            from torchdistill.losses.mid_level import VIDLoss
            from torchdistill.models.wrapper import Regressor4VID
        self.regressors = nn.ModuleDict()
        for level in self._levels(self.student_shapes):
            channels_s, channels_t = self.student_shapes[level][0], self.teacher_shapes[level][0]
            self.regressors[str(level)] = Regressor4VID(
                channels_s, channels_t, channels_t, floor, variance
            )
        self.criterion = VIDLoss(PAIRS)

    def level_loss(self, level: int, student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
        """Return the negative log likelihood of the teacher's map, without its constant."""
        student_BCHW, teacher_BCHW = on_one_grid(student_BCHW, teacher_BCHW)
        predicted = self.regressors[str(level)](student_BCHW)
        return self.criterion(_placed(predicted), _placed(teacher_BCHW))


class DIST(BaselineLoss):
    """Correlations of the predictions, between the classes of an image and within a class.

    Args:
        setup: what it is built for.
        beta: weight between classes.
        gamma: weight within classes.
        tau: temperature of the logits.

    Raises:
        ConfigError: a weight is negative, both are 0, or tau is not above 0.

    Source: Huang et al., arXiv 2205.10536.
    """

    needs = ("student_logits", "teacher_logits")

    def __init__(self, setup: Setup, *, beta: float, gamma: float, tau: float):
        super().__init__(setup)
        require(temperature_problem(tau, "tau"), *weight_problems(beta=beta, gamma=gamma))
        with _installed(self.name):
            from torchdistill.losses.mid_level import DISTLoss
        self.criterion = DISTLoss(PLACE, "output", PLACE, "output", beta=beta, gamma=gamma, tau=tau)

    @full_precision
    def loss(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Return tau^2 times the weighted sum of 1 minus each correlation."""
        require(shape_problem("logits", student_logits, teacher_logits))
        return self.criterion(_placed(student_logits), _placed(teacher_logits.detach()))


@contextmanager
def _installed(name: str) -> Iterator[None]:
    """Raise ConfigError where what is imported inside is not installed."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            f"{name} needs the torchdistill package ({error}): pip install torchdistill"
        ) from error


def _placed(output: Tensor | tuple[Tensor, Tensor]) -> dict[str, dict[str, Any]]:
    """Return what torchdistill's losses take as a model's outputs."""
    return {PLACE: {"output": output}}


def _embedded(features_BCHW: Tensor) -> Tensor:
    """Average maps over their positions (B, C)."""
    return features_BCHW.mean((2, 3))
