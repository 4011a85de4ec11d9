"""The graph of a batch's tokens against loops over its formulas, in float64.

Shape letters: B batch, C channels, H height, W width, M drawn tokens of an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from raygkd.errors import ConfigError
from raygkd.losses import baseline_loss
from raygkd.losses.tokens import drawn_positions, token_graph_loss

T = 0.5
POSITIONS = torch.tensor([[3, 0], [1, 2], [0, 5]])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def softmax(row: Sequence[float]) -> list[float]:
    total = sum(map(math.exp, row))
    return [math.exp(value) / total for value in row]


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / (math.hypot(*a) * math.hypot(*b))


def naive(student: Tensor, teacher: Tensor, drawn: Sequence[Sequence[int]], context: float):
    """Return the loss, with tokens named by image and position."""
    images, positions = range(len(student)), range(student.shape[2] * student.shape[3])
    tokens = [
        {(b, n): maps[b].flatten(1)[:, n].tolist() for b in images for n in positions}
        for maps in (student, teacher)
    ]
    vertices = [(b, n) for b in images for n in drawn[b]]

    def divergence(of: tuple[int, int], others: list[tuple[int, int]]) -> float:
        p_s, p_t = (softmax([cosine(side[of], side[o]) / T for o in others]) for side in tokens)
        return sum(t * math.log(t / s) for s, t in zip(p_s, p_t, strict=True))

    total = 0.0
    for vertex in vertices:
        total += divergence(vertex, [other for other in vertices if other != vertex])
        inside = [(vertex[0], n) for n in positions if n != vertex[1]]
        total += context * divergence(vertex, inside)
    return total / len(vertices)


@pytest.mark.parametrize("context", [0.0, 0.7])
def test_the_graph_follows_its_formula(context: float):
    student, teacher = random(3, 4, 2, 3), random(3, 5, 2, 3, seed=1)
    value = token_graph_loss(student, teacher, T, POSITIONS, context)
    expected = naive(student, teacher, POSITIONS.tolist(), context)
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_without_a_draw_every_position_is_a_vertex():
    student, teacher = random(2, 4, 2, 2), random(2, 5, 2, 2, seed=1)
    value = token_graph_loss(student, teacher, T)
    assert value.item() == pytest.approx(naive(student, teacher, [range(4)] * 2, 1.0), rel=1e-12)


def test_the_gradient_is_that_of_the_value():
    student = random(3, 2, 2, 3).requires_grad_()
    teacher = random(3, 3, 2, 3, seed=1)
    assert gradcheck(lambda maps: token_graph_loss(maps, teacher, T, POSITIONS), student)


def test_order_of_images_positions_and_channels_and_scale_of_tokens_do_not_matter():
    student, teacher = random(3, 4, 2, 3), random(3, 5, 2, 3, seed=1)
    value = token_graph_loss(student, teacher, T, POSITIONS)
    images, places = [2, 0, 1], [4, 2, 0, 5, 1, 3]
    moved = torch.tensor([[places.index(n) for n in row] for row in POSITIONS.tolist()])
    changed = [
        token_graph_loss(student[images], teacher[images], T, POSITIONS[images]),
        token_graph_loss(student[:, [3, 1, 0, 2]], teacher[:, [1, 0, 4, 3, 2]], T, POSITIONS),
        token_graph_loss(
            student.flatten(2)[..., places].view_as(student),
            teacher.flatten(2)[..., places].view_as(teacher),
            T,
            moved,
        ),
        token_graph_loss(
            student * random(3, 1, 2, 3, seed=2).abs(), 7 * teacher, T, POSITIONS.flip(1)
        ),
    ]
    for other in changed:
        torch.testing.assert_close(other, value, rtol=1e-12, atol=0)


def test_one_token_has_no_relations_and_no_gradient():
    student = random(1, 4, 1, 1).requires_grad_()
    value = token_graph_loss(student, random(1, 5, 1, 1, seed=1), T)
    value.backward()
    assert value == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_a_draw_takes_different_positions_of_each_image_and_repeats_with_the_seed():
    torch.manual_seed(0)
    drawn = drawn_positions(50, 12, 250)
    assert drawn is not None
    assert drawn.shape == (50, 5)
    assert all(len(set(row)) == 5 for row in drawn.tolist())
    assert set(drawn.flatten().tolist()) == set(range(12))
    assert len(set(map(tuple, drawn.tolist()))) > 40
    torch.manual_seed(0)
    assert torch.equal(drawn, drawn_positions(50, 12, 250))
    assert not torch.equal(drawn, drawn_positions(50, 12, 250))


@pytest.mark.parametrize(
    ("tokens", "shape"), [(1, (4, 1)), (11, (4, 2)), (23, (4, 5)), (24, None), (99, None)]
)
def test_a_draw_is_bounded(tokens: int, shape: tuple[int, int] | None):
    drawn = drawn_positions(4, 6, tokens)
    assert (drawn if drawn is None else tuple(drawn.shape)) == shape


def test_the_method_draws_once_for_both_on_the_coarser_grid():
    student, teacher = random(3, 4, 4, 6), random(3, 5, 2, 3, seed=1)
    module = baseline_loss("trg", tokens=6, temperature=T, context=0.7)
    given = {"student_features": {1: student}, "teacher_features": {1: teacher}}
    torch.manual_seed(3)
    value = module(**given)
    torch.manual_seed(3)
    drawn = drawn_positions(3, 6, 6)
    assert drawn is not None
    pooled = student.unflatten(2, (2, 2)).unflatten(4, (3, 2)).mean((3, 5))
    assert value.item() == pytest.approx(naive(pooled, teacher, drawn.tolist(), 0.7), rel=1e-12)
    assert module(**given) != value


def test_memory_is_bounded_by_the_drawn_tokens():
    shapes: list[tuple[int, ...]] = []
    student = torch.randn(4, 3, 32, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda kept: (shapes.append(tuple(kept.shape)), kept)[1], lambda kept: kept
    ):
        module = baseline_loss("trg", tokens=64)
        module(
            student_features={1: student}, teacher_features={1: torch.randn(4, 3, 32, 32)}
        ).backward()
    # 64 tokens against 1024 positions each; all pairs of positions would be 256 times as much
    assert max(map(math.prod, shapes)) == 64 * 1024


def test_a_temperature_of_zero_is_refused():
    maps = random(2, 3, 2, 2)
    with pytest.raises(ConfigError, match=r"^temperature must be a finite number above 0; got 0"):
        token_graph_loss(maps, maps, 0.0)
