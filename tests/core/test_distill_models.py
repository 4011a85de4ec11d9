"""``raygkd.distill`` with models that return, freeze or keep something."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_nets import LEVELS, Net
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import raygkd
from raygkd.api import _usual
from raygkd.assembly.own_task import joined
from raygkd.config import OptimConfig
from raygkd.errors import ConfigError, Diverged

torch.set_num_threads(1)


@dataclass
class Output:
    """What a model of another library returns."""

    logits: Tensor
    hidden: Tensor


class Talking(Net):
    """A model whose output is an object, a dict or a tuple.

    Args:
        kind: of its output.
    """

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, images: Tensor) -> Any:
        scores = super().forward(images)
        return {
            "object": Output(scores, images),
            "dict": {"logits": scores, "hidden": images},
            "tuple": (scores, images),
            "other": {"a": scores, "b": [images]},
        }[self.kind]


@pytest.mark.parametrize("kind", ["object", "dict"])
def test_outputs_with_logits(
    pair: tuple[Net, Net], images: Tensor, labels: Tensor, kind: str
) -> None:
    student = Talking(kind)
    data = TensorDataset(images, labels)
    levels = {"body.2": "body.3"}
    [one] = raygkd.distill(
        pair[0], student, data, data, levels=levels, epochs=1, batch_size=4, device="cpu"
    )
    assert 0 <= one["val_score"] <= 1
    matching = raygkd.Matching(pair[0], student, images, levels=levels)
    assert type(matching(images)[0]) is type(student(images))


@pytest.mark.parametrize("kind", ["tuple", "other"])
def test_outputs_without_logits(
    pair: tuple[Net, Net], images: Tensor, labels: Tensor, kind: str
) -> None:
    name: Any = {"tuple": 0, "other": "a"}[kind]
    settings: dict[str, Any] = {"levels": LEVELS, "epochs": 1, "batch_size": 4, "device": "cpu"}
    data = TensorDataset(images, labels)
    [one] = raygkd.distill(
        *(pair[0], Talking(kind), data, data),
        loss=lambda outputs, labels: F.cross_entropy(outputs[name], labels),
        metric=lambda outputs, labels: len(outputs[name]) / len(labels),
        **settings,
    )
    assert one["val_score"] == 1.0
    with pytest.raises(ConfigError, match=r"^loss: the student returns a .* without logits"):
        raygkd.distill(pair[0], Talking(kind), data, **settings)
    with pytest.raises(ConfigError, match=r"^metric: the student returns a object without logits"):
        joined([object()])


def test_modules_in_eval_mode_stay_in_it(pair: tuple[Net, Net], images: Tensor) -> None:
    teacher, student = pair
    data = TensorDataset(images, torch.arange(8) % 5)
    settings: dict[str, Any] = {"levels": LEVELS, "epochs": 1, "batch_size": 4, "device": "cpu"}
    student.body[3].eval()
    before = student.body[3].running_mean.clone()
    raygkd.distill(teacher, student, data, **settings)
    assert torch.equal(student.body[3].running_mean, before)
    # the whole student is in eval mode now
    raygkd.distill(teacher, student, data, **settings)
    assert not torch.equal(student.body[3].running_mean, before)


def test_the_best_epoch_is_kept_if_asked(pair: tuple[Net, Net], images: Tensor) -> None:
    data = TensorDataset(images, torch.arange(8) % 5)
    scores = iter([0.2, 0.9, 0.4])
    seen: list[dict[str, Tensor]] = []
    student = pair[1]

    def metric(outputs: Tensor, labels: Tensor) -> float:
        seen.append(copy.deepcopy(student.state_dict()))
        return next(scores)

    settings: dict[str, Any] = {"levels": LEVELS, "epochs": 3, "batch_size": 4, "device": "cpu"}
    history = raygkd.distill(pair[0], student, data, data, metric=metric, keep="best", **settings)
    assert [one["val_score"] for one in history] == [0.2, 0.9, 0.4]
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, seen[1][name])
    with pytest.raises(ConfigError, match='keep: \'best\' must be "last", or "best" with val'):
        raygkd.distill(pair[0], student, data, keep="best", **settings)


def test_norms_biases_and_adapters_have_no_weight_decay(pair: tuple[Net, Net]) -> None:
    student = pair[1]
    adapter = nn.Conv2d(2, 2, 1)
    parameters = [*student.parameters(), *adapter.parameters()]
    decayed, others = _usual(OptimConfig(), student, parameters).param_groups
    weights = [student.body[0].weight, student.body[2].weight, student.head.weight]
    assert [id(one) for one in decayed["params"]] == [id(one) for one in weights]
    assert decayed["weight_decay"] == OptimConfig.weight_decay
    assert others["weight_decay"] == 0.0
    assert len(others["params"]) == len(parameters) - 3


def test_errors_speak_of_arguments(pair: tuple[Net, Net], images: Tensor) -> None:
    data = TensorDataset(images, torch.arange(8) % 5)
    settings: dict[str, Any] = {"levels": LEVELS, "epochs": 2, "batch_size": 4, "device": "cpu"}
    with pytest.raises(Diverged, match=r"; lower lr, or the weights alpha, beta and gamma$"):
        raygkd.distill(*pair, data, lr=1e30, weights_unit="loss", **settings)
    with pytest.raises(ConfigError, match=r"^weights_unit 'x': must be"):
        raygkd.distill(*pair, data, weights_unit="x", **settings)
