"""Wrong arguments of ``raygkd.Matching`` and ``raygkd.distill`` are one line, before training."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_nets import LEVELS, Net, step
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import raygkd
from raygkd.errors import ConfigError, DataError

torch.set_num_threads(1)


def distill(pair: tuple[Any, Any], images: Tensor, **changes: Any) -> list[dict[str, float]]:
    """Train for an epoch of two steps, unless changed."""
    data = TensorDataset(images, torch.arange(8) % 5)
    usual = {"levels": LEVELS, "epochs": 1, "batch_size": 4, "device": "cpu"}
    return raygkd.distill(*pair, **{"train_data": data, **usual, **changes})


@pytest.mark.parametrize("levels", [{"body.2": 1}, {"body.2": None}, 5, True, b"body", [None]])
def test_levels_that_are_no_paths(pair: tuple[Net, Net], images: Tensor, levels: Any) -> None:
    with pytest.raises(ConfigError, match=r"^levels: .* must be paths of modules"):
        raygkd.Matching(*pair, images, levels=levels)


@pytest.mark.parametrize("teacher", [None, "resnet20", Net, lambda images: images])
def test_a_model_that_is_no_module(pair: tuple[Net, Net], images: Tensor, teacher: Any) -> None:
    with pytest.raises(ConfigError, match=r"^teacher: .* must be a torch.nn.Module$"):
        raygkd.Matching(teacher, pair[1], images, levels=LEVELS)
    with pytest.raises(ConfigError, match=r"^teacher: .* must be a torch.nn.Module$"):
        distill((teacher, pair[1]), images)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_models_that_cannot_be_hooked_or_trained(
    pair: tuple[Net, Net], images: Tensor, role: str
) -> None:
    with torch.inference_mode():
        inferring = Net()
    for made, message in (
        (torch.jit.trace(Net().eval(), images), "is a TorchScript module"),
        (inferring, "was created under torch.inference_mode"),
    ):
        models = (made, pair[1]) if role == "teacher" else (pair[0], made)
        with pytest.raises(ConfigError, match=f"^the {role} {message}"):
            raygkd.Matching(*models, images, levels=LEVELS)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_found_at_once(
    pair: tuple[Net, Net], images: Tensor, value: float
) -> None:
    pair[0].body[0].weight.data[0, 0, 0, 0] = value
    told = "module 'body.3' of the teacher gives NaN or infinite values"
    with pytest.raises(ConfigError, match=told):
        raygkd.Matching(*pair, images, levels=LEVELS)
    with pytest.raises(ConfigError, match=told):
        distill(pair, images)
    with pytest.raises(ConfigError, match="of the student gives NaN or infinite values"):
        raygkd.Matching(Net(), Net(), images * math.nan, levels=LEVELS)


def test_a_map_of_one_channel(pair: tuple[Net, Net], images: Tensor) -> None:
    with pytest.raises(ConfigError, match="a map of one channel has no graph of channels"):
        raygkd.Matching(Net(1), pair[1], images, levels=LEVELS)


def test_models_whose_weights_are_not_there_yet(images: Tensor) -> None:
    teacher = nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU())
    matching = raygkd.Matching(teacher, Net(), images, levels={"body.0": "0"})
    assert matching(images)[1] > 0


def test_a_replaced_module_is_named_as_its_owner_does(
    pair: tuple[Net, Net], images: Tensor
) -> None:
    matching = raygkd.Matching(*pair, images, levels=LEVELS)
    pair[1].body[2] = nn.Conv2d(6, 6, 3, 2, 1)
    with pytest.raises(ConfigError, match=r"^module 'body.2' of Net returned nothing .* replaced"):
        matching(images)


def test_a_matching_made_in_inference_mode_is_trained(
    pair: tuple[Net, Net], images: Tensor, labels: Tensor
) -> None:
    with torch.inference_mode():
        matching = raygkd.Matching(*pair, images, levels=LEVELS)
    before = pair[1].body[2].weight.clone()
    step(matching, pair[1], images, labels)
    assert not torch.equal(pair[1].body[2].weight, before)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_distill_trains_whatever_mode_its_caller_is_in(
    pair: tuple[Net, Net], images: Tensor, around: Callable[[], Any]
) -> None:
    twins = copy.deepcopy(pair)
    [expected] = distill(twins, images)
    with around():
        [found] = distill(pair, images)
    assert found["train_loss"] == expected["train_loss"]


def test_a_compiled_step_has_the_same_loss(
    pair: tuple[Net, Net], images: Tensor, labels: Tensor
) -> None:
    torch.compiler.reset()
    # from the second size of maps on the compiler takes sizes for symbols
    levels = {"body.0": "body.0", "body.2": "body.3"}
    matching = raygkd.Matching(*(one.eval() for one in pair), images, levels=levels).eval()

    def loss(count: int) -> Tensor:
        outputs, distillation = matching(images[:count])
        return F.cross_entropy(outputs, labels[:count]) + distillation

    compiled = torch.compile(loss, backend="eager")
    for count in (8, 4):
        found = compiled(count)
        assert found.item() == pytest.approx(loss(count).item(), rel=1e-5)
    found.backward()
    assert pair[1].body[0].weight.grad.norm() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": None}, "^loss: None must be a function$"),
        ({"loss": nn.CrossEntropyLoss}, "^loss: .* must be a function$"),
        ({"metric": "accuracy"}, "^metric: 'accuracy' must be a function$"),
        ({"reporter": "x"}, "^reporter: 'x' must be a function$"),
        ({"optimizer": "adam"}, "^optimizer: 'adam' must be a function$"),
        ({"optimizer": lambda parameters: None}, "must return a torch.optim.Optimizer"),
        ({"optimizer": torch.optim.LBFGS}, "must return a torch.optim.Optimizer, and not LBFGS"),
        ({"loss": lambda outputs, labels: None}, "^loss: must return a scalar tensor, not None$"),
        ({"loss": lambda outputs, labels: 1.0}, "^loss: must return a scalar tensor, not 1.0$"),
        ({"loss": lambda outputs, labels: outputs.sum(1)}, r"not a tensor of shape \(4,\)$"),
        ({"loss": lambda outputs, labels: outputs.sum().detach()}, "tensor without a gradient$"),
        ({"metric": lambda outputs, labels: None}, "^metric: must return a number, not None$"),
        ({"metric": lambda outputs, labels: outputs}, "^metric: must return a number, not tensor"),
        ({"device": "banana"}, r"^device: 'banana' cannot be used \(RuntimeError: "),
        ({"device": "meta"}, r"^device: 'meta' cannot be used \(RuntimeError: "),
        ({"device": ""}, r"^device: '' cannot be used \(RuntimeError: "),
        ({"epochs": 1.5}, "^epochs 1.5: must be a whole number$"),
    ],
)
def test_arguments_of_distill(
    pair: tuple[Net, Net], images: Tensor, changes: dict[str, Any], message: str
) -> None:
    val_data = TensorDataset(images, torch.arange(8) % 5)
    with pytest.raises(ConfigError, match=message) as raised:
        distill(pair, images, val_data=val_data, **changes)
    assert "\n" not in str(raised.value)
    assert not any(module._forward_hooks for model in pair for module in model.modules())


def test_a_student_that_cannot_learn(pair: tuple[Net, Net], images: Tensor) -> None:
    pair[1].requires_grad_(False)
    with pytest.raises(ConfigError, match=r"^student: all its parameters are frozen"):
        distill(pair, images)


@pytest.mark.parametrize("labels", [torch.full((8,), 9), torch.rand(8), torch.full((8,), -1)])
def test_labels_that_cross_entropy_cannot_take(
    pair: tuple[Net, Net], images: Tensor, labels: Tensor
) -> None:
    told = r"^loss: cross_entropy fails on outputs \(4, 5\) and labels \(4,\) of torch\."
    with pytest.raises(ConfigError, match=told):
        distill(pair, images, train_data=TensorDataset(images, labels))


def test_images_that_form_no_batch(pair: tuple[Net, Net], images: Tensor) -> None:
    sizes = [(torch.rand(3, 8, 8 + extra), 0) for extra in range(4)]
    for data in (sizes, [(object(), 0)] * 4):
        with pytest.raises(DataError, match=r"^data: images and labels must be tensors, arrays"):
            distill(pair, images, train_data=data)


def test_the_best_epoch_is_not_one_without_a_score(pair: tuple[Net, Net], images: Tensor) -> None:
    data = TensorDataset(images, torch.arange(8) % 5)
    scores = iter([math.nan, 0.5, 0.4])
    kept = []

    def remember(metrics: dict[str, float]) -> None:
        kept.append(pair[1].head.weight.detach().clone())
        metrics.clear()

    history = distill(
        pair,
        images,
        val_data=data,
        epochs=3,
        keep="best",
        metric=lambda *_: next(scores),
        reporter=remember,
    )
    assert [one["val_score"] for one in history[1:]] == [0.5, 0.4]
    assert torch.equal(pair[1].head.weight, kept[1])
