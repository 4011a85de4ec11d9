"""The baselines by name, with what was published of each: weights, settings, levels, source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from raygkd.errors import ConfigError, near
from raygkd.losses.base import BaselineLoss, Setup
from raygkd.losses.features import AT, ICKD, VID, FitNet
from raygkd.losses.levels import Shape, chosen_levels
from raygkd.losses.logits import DIST, DKD, KD, StandardisedKD
from raygkd.losses.pyramids import CWD, FGD, PKD
from raygkd.losses.samples import PKT, RKD, SP
from raygkd.registry import METHOD_GROUP, Registry


@dataclass(frozen=True)
class Baseline:
    """What is known of a baseline before it is built.

    The total is ``task_weight * task loss + weight * loss``.

    Attributes:
        build: makes the loss of a ``Setup`` and the settings.
        task: "classification" or "detection".
        reads: "logits" or "features".
        weight: published weight of its term; of a detector's, for one-stage detectors.
        source: authors, and where it was published.
        settings: setting -> published value.
        levels: those it reads of those that there are: "all", "middle" or "last"; None of logits.
        task_weight: published weight of the task's loss beside it.
        ramp: share of the training over which the weight rises from 0, linearly.
        two_stage_weight: published weight for two-stage detectors, where it is another.
        two_stage_settings: setting -> published value for two-stage detectors, where another.
    """

    build: Callable[..., BaselineLoss]
    task: str
    reads: str
    weight: float
    source: str
    settings: Mapping[str, float] = field(default_factory=dict)
    levels: str | None = None
    task_weight: float = 1.0
    ramp: float = 0.0
    two_stage_weight: float | None = None
    two_stage_settings: Mapping[str, float] = field(default_factory=dict)

    def weight_for(self, *, two_stage: bool) -> float:
        """Return the published weight of the term for a kind of detector."""
        if two_stage and self.two_stage_weight is not None:
            return self.two_stage_weight
        return self.weight

    def settings_for(self, *, two_stage: bool) -> dict[str, float]:
        """Return the published settings for a kind of detector."""
        return {**self.settings, **(self.two_stage_settings if two_stage else {})}

    def levels_of(self, levels: Iterable[int]) -> tuple[int, ...]:
        """Return those of the levels, at least one, that it reads by default; none for logits."""
        return chosen_levels(self.levels, levels) if self.levels else ()


BASELINES: Registry[Baseline] = Registry("baseline", METHOD_GROUP, Baseline)


def baseline_loss(
    name: str,
    *,
    student_shapes: Mapping[int, Shape] | None = None,
    teacher_shapes: Mapping[int, Shape] | None = None,
    levels: Sequence[int] | None = None,
    canvas: int | None = None,
    two_stage: bool = False,
    **settings: float,
) -> BaselineLoss:
    """Return a published loss as a module; its ``weight`` is the published one of its term.

    What a baseline has no use for (the shapes, for logits) is not looked at.

    Args:
        name: one of ``BASELINES``.
        student_shapes: level -> (C, H, W) of the student's feature maps, for adapters.
        teacher_shapes: the same of the teacher, for the same levels.
        levels: those it reads; None for its default choice of the levels of the shapes or, without
            shapes, of the features in a call.
        canvas: side in pixels of the square that both detectors see; "fgd" needs it.
        two_stage: whether the student is a two-stage detector, for which other weights were
            published.
        settings: of the baseline, in place of the published ones.

    Raises:
        ConfigError: an unknown name or setting, or one out of range; shapes or canvas are missing.
    """
    baseline = BASELINES.get(name)
    published = baseline.settings_for(two_stage=two_stage)
    for setting in settings:
        if setting not in published:
            raise ConfigError(
                f"{name} has no setting {setting!r}{near(setting, published)}"
                f" (allowed: {', '.join(published) or 'none'})"
            )
    setup = Setup(
        name,
        baseline.weight_for(two_stage=two_stage),
        levels if levels is not None else baseline.levels or "all",
        student_shapes,
        teacher_shapes,
        canvas,
    )
    return baseline.build(setup, **{**published, **settings})


# weights of CIFAR-100, where nothing else is said: those of the RepDistiller repository
for _name, _baseline in {
    "kd": Baseline(
        KD,
        "classification",
        "logits",
        weight=0.9,
        task_weight=0.1,
        settings={"temperature": 4.0},
        source="Hinton et al., arXiv 1503.02531",
    ),
    "dkd": Baseline(
        DKD,
        "classification",
        "logits",
        weight=1.0,
        ramp=20 / 240,
        settings={"alpha": 1.0, "beta": 8.0, "temperature": 4.0},
        source="Zhao et al., CVPR 2022, arXiv 2203.08679; constants of its mdistiller repository",
    ),
    "fitnet": Baseline(
        FitNet,
        "classification",
        "features",
        weight=100.0,
        levels="middle",
        source="Romero et al., ICLR 2015, arXiv 1412.6550",
    ),
    "at": Baseline(
        AT,
        "classification",
        "features",
        weight=1000.0,
        levels="all",
        source="Zagoruyko and Komodakis, ICLR 2017, arXiv 1612.03928",
    ),
    "sp": Baseline(
        SP,
        "classification",
        "features",
        weight=3000.0,
        levels="last",
        source="Tung and Mori, ICCV 2019, arXiv 1907.09682",
    ),
    "rkd": Baseline(
        RKD,
        "classification",
        "features",
        weight=1.0,
        levels="last",
        settings={"distance": 25.0, "angle": 50.0},
        source="Park et al., CVPR 2019, arXiv 1904.05068",
    ),
    "pkt": Baseline(
        PKT,
        "classification",
        "features",
        weight=30000.0,
        levels="last",
        source="Passalis and Tefas, ECCV 2018, arXiv 1803.10837",
    ),
    "vid": Baseline(
        VID,
        "classification",
        "features",
        weight=1.0,
        levels="all",
        settings={"variance": 5.0, "floor": 1e-5},
        source="Ahn et al., CVPR 2019, arXiv 1904.05835",
    ),
    "dist": Baseline(
        DIST,
        "classification",
        "logits",
        weight=1.0,
        settings={"beta": 1.0, "gamma": 1.0, "tau": 1.0},
        source="Huang et al., NeurIPS 2022, arXiv 2205.10536; defaults of its code",
    ),
    "logit-std": Baseline(
        StandardisedKD,
        "classification",
        "logits",
        weight=9.0,
        task_weight=0.1,
        settings={"temperature": 2.0},
        source="Sun et al., CVPR 2024, arXiv 2403.01427; constants of its repository",
    ),
    "ickd": Baseline(
        ICKD,
        "classification",
        "features",
        weight=2.5,
        levels="last",
        source="Liu et al., ICCV 2021 (ICKD-C); constants of its repository",
    ),
    "fgd": Baseline(
        FGD,
        "detection",
        "features",
        weight=1.0,
        levels="all",
        settings={
            "temperature": 0.5,
            "foreground": 1e-3,
            "background": 5e-4,
            "attention": 5e-4,
            "relation": 5e-6,
        },
        two_stage_settings={
            "foreground": 5e-5,
            "background": 2.5e-5,
            "attention": 5e-5,
            "relation": 5e-7,
        },
        source="Yang et al., CVPR 2022, arXiv 2111.11837; RetinaNet and Faster R-CNN of its "
        "repository",
    ),
    "cwd": Baseline(
        CWD,
        "detection",
        "features",
        weight=10.0,
        levels="all",
        settings={"tau": 1.0},
        source="Shu et al., ICCV 2021, arXiv 2011.13256; constants of the mmrazor repository",
    ),
    "pkd": Baseline(
        PKD,
        "detection",
        "features",
        weight=10.0,
        levels="all",
        two_stage_weight=6.0,
        source="Cao et al., NeurIPS 2022, arXiv 2207.02039; constants of the mmrazor repository",
    ),
}.items():
    BASELINES.register(_name)(_baseline)
