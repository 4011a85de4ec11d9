"""Learning rates of backbone and head, and frozen batch statistics.

Shapes: B batch, C channels, H height, W width, K classes.
"""

import pytest
import torch
from torch import nn

from raygkd.assembly.optimizers import optimizer_and_schedule, rate_groups, student_layers
from raygkd.config import Config, with_settings
from raygkd.engine import ClassifierObjective
from raygkd.errors import ConfigError
from raygkd.models import build_classifier


class Transformer(nn.Module):
    """Three blocks between a stem and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 2, 2)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3)]
        )
        self.head = nn.Linear(4, 5)


def with_adapter(student: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"student": student, "adapter": nn.Linear(2, 2)})


def optim(**settings):
    return with_settings(Config(), settings).optim


def rates(module: nn.Module, student: nn.Module, **settings) -> dict[str, float]:
    """Return parameter -> learning rate at the first step."""
    optimizer, _ = optimizer_and_schedule(optim(**settings), module, student, steps_per_epoch=4)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}


def test_all_parameters_are_one_group_where_no_rate_differs():
    module = with_adapter(build_classifier("resnet8", 5))
    [group] = rate_groups(optim(), module, module["student"])
    assert list(group.parameters) == list(module.parameters())


def test_layers_are_blocks_and_the_head_is_the_last():
    layers = student_layers(Transformer())
    assert [len(layer) for layer in layers] == [2, 4, 4, 4, 2]


def test_every_parameter_has_one_rate_that_falls_with_the_distance_from_the_head():
    module = with_adapter(Transformer())
    found = rates(module, module["student"], lr=1.0, backbone_lr_factor=0.5, layer_decay=0.1)
    assert found.keys() == dict(module.named_parameters()).keys()
    expected = {"stem": 5e-4, "blocks.0": 5e-3, "blocks.1": 0.05, "blocks.2": 0.5, "head": 1.0}
    for part, rate in expected.items():
        of_part = [lr for name, lr in found.items() if name.startswith(f"student.{part}.")]
        assert of_part == pytest.approx([rate] * len(of_part))
    assert found["adapter.weight"] == 1.0


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_frozen_epochs_move_only_the_head(optimizer):
    torch.manual_seed(0)
    student = build_classifier("resnet8", 5)
    chosen = optim(freeze_epochs=1, epochs=3, optimizer=optimizer, lr=0.1)
    stepping, schedule = optimizer_and_schedule(chosen, student, student, steps_per_epoch=2)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    for step in range(3):
        student(torch.randn(4, 3, 8, 8)).square().sum().backward()
        stepping.step()
        stepping.zero_grad()
        schedule.step()
        moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
        head = {"classifier.weight", "classifier.bias"}
        assert moved == (head if step < 2 else before.keys())


def test_frozen_batch_statistics_stay_and_the_rest_trains():
    torch.manual_seed(0)
    objective = ClassifierObjective(build_classifier("resnet8", 5), freeze_batch_norm=True)
    objective.train()
    before = {name: buffer.clone() for name, buffer in objective.student.named_buffers()}
    objective(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]), None)
    assert objective.student.training
    assert all(torch.equal(b, before[name]) for name, b in objective.student.named_buffers())


def test_more_frozen_epochs_than_epochs_are_refused():
    with pytest.raises(ConfigError, match="--freeze-epochs 3: must be below --epochs 3"):
        optim(freeze_epochs=3, epochs=3)
