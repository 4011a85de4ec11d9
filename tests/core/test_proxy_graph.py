"""The graph of samples and class proxies against loops over its formulas, in float64.

Shape letters: B batch, D entries of an embedding, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from small_runs import make_training, random_stream, weights
from torch import Tensor, nn
from torch.autograd import gradcheck

from raygkd.engine import training_step
from raygkd.errors import ConfigError
from raygkd.losses import baseline_class, baseline_loss
from raygkd.losses.proxies import edge_loss, node_loss
from raygkd.models.heads import ProxyTap

BATCH, CLASSES, SIZES = 3, 4, (5, 7)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs() -> dict[str, Tensor]:
    given = {}
    for number, (side, size) in enumerate(zip(("student", "teacher"), SIZES, strict=True)):
        given[f"{side}_logits"] = random(BATCH, CLASSES, seed=10 * number)
        given[f"{side}_embeddings"] = random(BATCH, size, seed=10 * number + 1)
        given[f"{side}_proxies"] = random(CLASSES, size, seed=10 * number + 2)
    return given


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    return cosine(*([value - sum(row) / len(row) for value in row] for row in (a, b)))


def softmax(row: Sequence[float], temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def naive(
    given: dict[str, list], projected: list, temperature: float, node: float, edge: float
) -> float:
    total = 0.0
    for b in range(BATCH):
        logits = given["student_logits"][b], given["teacher_logits"][b]
        p_s, p_t = (softmax(row, temperature) for row in logits)
        said = sum(t * math.log(t / s) for s, t in zip(p_s, p_t, strict=True))
        nodes = 0.0
        if node:
            nodes = 2 - cosine(projected[b], given["teacher_embeddings"][b]) - correlation(*logits)
        edges = [
            [correlation(given[f"{side}_embeddings"][b], row) for row in given[f"{side}_proxies"]]
            for side in ("student", "teacher")
        ]
        total += temperature**2 * said + node * nodes + edge * (1 - correlation(*edges))
    return total / BATCH


@pytest.mark.parametrize(("node", "edge"), [(0.7, 0.3), (0.0, 1.0), (2.0, 0.0), (0.0, 0.0)])
def test_the_loss_follows_its_formula(node: float, edge: float):
    torch.manual_seed(0)
    module: Any = baseline_loss(
        "prg", embedding_sizes=SIZES, temperature=2.0, node=node, edge=edge
    ).double()
    given = inputs()
    students = given["student_embeddings"]
    projected = module.projection(students) if node else students
    plain = {name: tensor.tolist() for name, tensor in given.items()}
    expected = naive(plain, projected.tolist(), 2.0, node, edge)
    assert module(**given).item() == pytest.approx(expected, rel=1e-10)


def test_gradients_are_those_of_the_values():
    module = baseline_loss("prg", embedding_sizes=SIZES).double()
    given = inputs()
    names = ["student_logits", "student_embeddings", "student_proxies"]
    tensors = tuple(given[name].requires_grad_() for name in names)

    def loss(*tensors: Tensor) -> Tensor:
        return module(**(given | dict(zip(names, tensors, strict=True))))

    assert gradcheck(loss, tensors)


def test_the_teacher_gets_no_gradient_and_may_be_of_inference_mode():
    module = baseline_loss("prg", embedding_sizes=SIZES).double()
    given = {name: tensor.requires_grad_() for name, tensor in inputs().items()}
    module(**given).backward()
    for name, tensor in given.items():
        assert (tensor.grad is not None) == name.startswith("student")
    expected = given["student_proxies"].grad
    with torch.inference_mode():
        held = {n: t.clone() for n, t in given.items() if n.startswith("teacher")}
    given["student_proxies"].grad = None
    module(**(given | held)).backward()
    torch.testing.assert_close(given["student_proxies"].grad, expected)


def test_order_of_images_and_classes_and_scale_of_a_side_do_not_matter():
    module = baseline_loss("prg", embedding_sizes=SIZES).double()
    given = inputs()
    images, classes = [2, 0, 1], [3, 1, 0, 2]
    moved = {}
    for name, tensor in given.items():
        rows = tensor[classes] if name.endswith("proxies") else tensor[images]
        moved[name] = rows[:, classes] if name.endswith("logits") else rows
    torch.testing.assert_close(module(**moved), module(**given))
    sides = [
        given[f"{side}_{of}"] for side in ("student", "teacher") for of in ("embeddings", "proxies")
    ]
    edges = edge_loss(*sides)
    scaled = edge_loss(3 * sides[0], 5 * sides[1] + 2, sides[2] / 9, 7 * sides[3])
    torch.testing.assert_close(scaled, edges)


def test_samples_without_spread_have_finite_gradients():
    student, teacher = torch.zeros(2, 5, requires_grad=True), torch.ones(2, 5)
    logits = torch.zeros(2, 4, requires_grad=True)
    loss = node_loss(student, teacher, logits, torch.zeros(2, 4))
    (loss + edge_loss(student, torch.zeros(4, 5), teacher, torch.ones(4, 5))).backward()
    for tensor in (student, logits):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


def test_labels_are_not_read():
    assert "targets" not in baseline_class("prg").needs
    curves = []
    for offset in (0, 3):
        training = make_training(random_stream(2), method="prg")
        for batch in training.stream.batches:
            training_step(training, dict(batch) | {"label": (batch["label"] + offset) % 10})
        curves.append(weights(training.objective.student))
    assert all(torch.equal(curves[0][name], curves[1][name]) for name in curves[0])


def test_labels_are_read_beside_it_if_they_are_given_a_weight():
    training = make_training(random_stream(1), method="prg", task_weight=1.0)
    assert training.objective.term_weights == {"task": 1.0, "prg": 1.0}


def test_a_tap_takes_what_the_last_layer_reads_and_its_weights():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 4))
    tap = ProxyTap(model, 4)
    images = torch.randn(2, 3, 2, 2)
    logits = model(images)
    embeddings = tap.take()
    assert tap.size == 6
    assert tap.class_proxies_KD is model[3].weight
    with pytest.raises(RuntimeError, match="has not been called since"):
        tap.take()
    tap.remove()
    torch.testing.assert_close(model[3](embeddings), logits)
    with pytest.raises(RuntimeError, match="has not been called since"):
        tap.take()


def test_a_model_may_have_class_proxies_of_its_own():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Identity()
            self.class_proxies = torch.randn(4, 12)

        def forward(self, images: Tensor) -> Tensor:
            return self.embedding(images.flatten(1)) @ self.class_proxies.mT

    model, images = Named(), torch.randn(2, 3, 2, 2)
    tap = ProxyTap(model, 4)
    model(images)
    torch.testing.assert_close(tap.take(), images.flatten(1))
    assert tap.class_proxies_KD is model.class_proxies


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_proxies": random(CLASSES, 6)}, r"^the student's embeddings, class proxies and"),
        ({"teacher_proxies": random(9, 7)}, r"^the teacher's .* got \(3, 7\), \(9, 7\), \(3, 4\)$"),
        ({"teacher_embeddings": random(3, 7, 2)}, r"^the teacher's embeddings, class proxies and"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes: dict[str, Tensor], message: str):
    module = baseline_loss("prg", embedding_sizes=SIZES).double()
    with pytest.raises(ConfigError, match=message):
        module(**(inputs() | changes))


def test_sizes_and_a_linear_last_layer_are_needed():
    with pytest.raises(ConfigError, match=r"^prg needs embedding_sizes"):
        baseline_loss("prg")
    with pytest.raises(ConfigError, match=r"^Conv2d has no linear last .*method than prg$"):
        ProxyTap(nn.Conv2d(3, 4, 1), 4)
