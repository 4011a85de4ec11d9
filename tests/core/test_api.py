"""``raygkd.distill`` and ``raygkd.Matching``: your own models, data and metric in this process."""

from __future__ import annotations

import copy
import doctest
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import raygkd
from raygkd import api
from raygkd.errors import ConfigError, DataError

torch.set_num_threads(1)
HEAVY = ("ray", "mlflow", "click", "rich", "pyarrow", "sklearn", "matplotlib", "yaml")
LEVELS = {"first": "trunk.1", "second": "trunk.3"}


class Small(nn.Module):
    """A student of grey images that says more than class scores."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(12, 20, 3, 2, 1), nn.BatchNorm2d(20), nn.ReLU())
        self.head = nn.Linear(20 * 16, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.second(self.first(images)).flatten(1))


class Large(nn.Module):
    """Its teacher, whose modules have other names and other sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 24, 3, 2, 1), nn.ReLU()),
        )
        self.head = nn.Linear(24, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.trunk(images).mean((2, 3)))


@pytest.fixture(scope="module")
def digits() -> tuple[TensorDataset, TensorDataset]:
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    data = [TensorDataset(images[part], torch.tensor(labels)[part]) for part in PARTS]
    return data[0], data[1]


PARTS = (slice(0, 512), slice(1200, 1400))


@pytest.fixture
def pair() -> tuple[Large, Small]:
    torch.manual_seed(0)
    return Large(), Small()


def test_the_examples_of_the_documentation_are_so() -> None:
    torch.manual_seed(0)
    found = doctest.testmod(api, extraglobs={"torch": torch, "F": F})
    assert found.attempted > 8
    assert found.failed == 0


def test_a_student_learns_and_nothing_else_changes(
    digits: tuple[TensorDataset, TensorDataset], pair: tuple[Large, Small]
) -> None:
    teacher, student = pair
    teacher.trunk[0].weight.requires_grad_(False)
    before = copy.deepcopy(teacher.state_dict())
    generator = torch.get_rng_state()
    told: list[dict[str, float]] = []

    def within_one(outputs: Tensor, labels: Tensor) -> Tensor:
        assert outputs.shape == (200, 10)
        return ((outputs.argmax(1) - labels).abs() <= 1).float().mean()

    history = raygkd.distill(
        *(teacher, student, *digits),
        levels=LEVELS,
        epochs=8,
        batch_size=32,
        lr=0.2,
        alpha=0.1,
        beta=0.1,
        gamma=0.1,
        metric=within_one,
        device="cpu",
        reporter=told.append,
    )
    assert history == told
    assert [one["epoch"] for one in history] == list(range(1, 9))
    assert history[-1]["val_score"] > 0.6
    for term in ("task", "vertex", "edge", "spectral"):
        assert history[-1][f"loss_{term}"] < history[0][f"loss_{term}"]
    assert not student.training
    assert teacher.training
    assert [parameter.requires_grad for parameter in teacher.parameters()].count(False) == 1
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert torch.equal(torch.get_rng_state(), generator)
    for model in pair:
        assert not any(module._forward_hooks for module in model.modules())


def test_a_plain_loop_with_the_loss_comes_to_the_same_weights(
    digits: tuple[TensorDataset, TensorDataset], pair: tuple[Large, Small]
) -> None:
    teacher, student = pair
    other = copy.deepcopy(student)
    loader = DataLoader(digits[0], 64)
    raygkd.distill(
        *(teacher, student, loader),
        levels=LEVELS,
        epochs=1,
        alpha=40.0,
        beta=2.0,
        weights_unit="loss",
        dim=4,
        loss=F.multi_margin_loss,
        optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-2),
        device="cpu",
    )
    images = next(iter(loader))[0]
    matching = raygkd.Matching(teacher, other, images, levels=LEVELS, beta=2.0, dim=4)
    parameters = [*other.parameters(), *matching.parameters()]
    adapters = {name for name, _ in matching.named_parameters()}
    kinds = ("conv.weight", "norm.weight", "norm.bias")
    assert adapters == {f"graph.adapters.{level}.{kind}" for level in (1, 2) for kind in kinds}
    optimizer = torch.optim.Adam(parameters, 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(loader))
    for images, labels in loader:
        outputs, distillation = matching(images)
        optimizer.zero_grad()
        (F.multi_margin_loss(outputs, labels) + distillation).backward()
        optimizer.step()
        schedule.step()
    matching.close()
    for ours, plain in zip(student.eval().parameters(), other.parameters()):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": ["frist"]}, "student Small has no module 'frist'; did you mean 'first'"),
        ({"levels": {"first": "head"}}, r"'head' of the teacher gives \(2, 10\), not a feature"),
        ({"levels": [1, 2]}, r"levels: \[1, 2\] must be paths of modules, such as"),
        ({"levels": []}, "must be paths of modules, such as"),
        ({"levels": "first"}, "must be paths of modules, such as"),
        ({"levels": {"first": "trunk.1"}, "dim": 16}, "dim"),
        ({"epochs": 0}, "^epochs 0: must be at least 1"),
        ({"lr": "high"}, "^lr 'high': must be a number"),
    ],
)
def test_settings_that_cannot_be(
    digits: tuple[TensorDataset, TensorDataset],
    pair: tuple[Large, Small],
    changes: dict[str, Any],
    message: str,
) -> None:
    settings = {"levels": LEVELS, "device": "cpu", **changes}
    with pytest.raises(ConfigError, match=message):
        raygkd.distill(*pair, digits[0], **settings)
    for model in pair:
        assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (iter([]), "train_data: a list_iterator has no length"),
        ([], "train_data: contains no images"),
        ([torch.zeros(1, 8, 8)] * 70, "a batch is a Tensor, not a pair"),
        ([(torch.zeros(1, 8, 8), "cat")] * 70, "the labels of a batch are a tuple, not a tensor"),
    ],
)
def test_data_that_cannot_be(pair: tuple[Large, Small], data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        raygkd.distill(*pair, data, levels=LEVELS, device="cpu")


def test_it_needs_torch_alone_and_importing_the_package_nothing() -> None:
    code = f"""
import sys
import raygkd
assert "torch" not in sys.modules
sys.modules.update(dict.fromkeys({HEAVY}))
import torch
from raygkd.models import build_model
data = torch.utils.data.TensorDataset(torch.rand(8, 3, 8, 8), torch.arange(8) % 4)
teacher, student = (build_model(name, 4, (8, 8)) for name in ("resnet14", "resnet8"))
assert len(raygkd.distill(teacher, student, data, epochs=1, batch_size=4)) == 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        raygkd.distil  # noqa: B018
