"""The maps that a report compares: of the student as it began, and as it ended.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raygkd.assembly.models import untrained_file
from raygkd.assembly.student_objective import build_objective
from raygkd.assembly.training import normaliser
from raygkd.config import Config, from_mapping
from raygkd.data.spec import ImageSpec
from raygkd.engine import Teacher
from raygkd.models import ModelFile, build_from_file
from raygkd.workflows.channel_graphs import CPU, MatchedMaps, matched_maps

SPEC = ImageSpec(class_names=("a", "b"), image_size=(16, 16), mean=(0.4,) * 3, std=(0.3,) * 3)
PIXELS_BCHW = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TREE = {
    "model": {"teacher": "resnet14", "student": "resnet8"},
    "method": {"levels": [2, 3], "centre": True},
    "optim": {"seed": 5},
}


@pytest.fixture
def config() -> Config:
    return from_mapping(TREE)


@pytest.fixture
def teacher() -> ModelFile:
    return untrained_file("resnet14", SPEC)


def checkpoint_of(config: Config, teacher: ModelFile) -> dict[str, dict[str, Tensor]]:
    """Return what a checkpoint holds of a training that has not begun."""
    objective = build_objective(config, SPEC, build_from_file(teacher))
    assert objective.graph is not None
    return {"student": objective.student.state_dict(), "adapters": objective.graph.state_dict()}


def found(config: Config, teacher: ModelFile, **changes: object) -> dict[int, MatchedMaps]:
    checkpoint = {**checkpoint_of(config, teacher), **changes}
    return matched_maps(config, SPEC, teacher, checkpoint, PIXELS_BCHW)


def test_the_student_ends_behind_the_adapter_of_its_checkpoint(
    config: Config, teacher: ModelFile
) -> None:
    adapters = checkpoint_of(config, teacher)["adapters"]
    turned = {name: weight.flip(0) for name, weight in adapters.items()}
    plain, flipped = found(config, teacher), found(config, teacher, adapters=turned)
    for level in (2, 3):
        torch.testing.assert_close(flipped[level].after_BCHW, plain[level].after_BCHW.flip(1))
        assert not torch.equal(flipped[level].after_BCHW, plain[level].after_BCHW)
        assert torch.equal(flipped[level].before_BCHW, plain[level].before_BCHW)


def test_a_trained_adapter_normalises_by_what_it_has_seen(
    config: Config, teacher: ModelFile
) -> None:
    adapters = checkpoint_of(config, teacher)["adapters"]
    wider = {n: value * (4.0 if "running_var" in n else 1.0) for n, value in adapters.items()}
    plain, other = found(config, teacher), found(config, teacher, adapters=wider)
    for level in (2, 3):
        torch.testing.assert_close(other[level].after_BCHW, plain[level].after_BCHW / 2)
        assert torch.equal(other[level].before_BCHW, plain[level].before_BCHW)


def test_the_student_begins_as_its_first_step_sees_it(config: Config, teacher: ModelFile) -> None:
    objective = build_objective(config, SPEC, build_from_file(teacher))
    assert objective.graph is not None
    listen = Teacher(objective.student, {2: 2, 3: 3})
    objective.train()
    features = listen(normaliser(SPEC.mean, SPEC.std, CPU, SPEC.image_size)(PIXELS_BCHW)).features
    # what it ends with does not matter
    other = untrained_file("resnet8", SPEC, seed=9).state_dict
    for level, of in found(config, teacher, student=other).items():
        wanted_BCHW = objective.graph.student_maps(level, features[level])
        torch.testing.assert_close(of.before_BCHW, wanted_BCHW)
        assert of.before_BCHW.shape == of.teacher_BCHW.shape == of.after_BCHW.shape


def test_what_is_compared_is_centred_where_the_loss_centres(
    config: Config, teacher: ModelFile
) -> None:
    for of in found(config, teacher).values():
        for maps_BCHW in (of.teacher_BCHW, of.before_BCHW, of.after_BCHW):
            assert maps_BCHW.mean((2, 3)).abs().max() < 1e-5
